"""`python -m ratethrottle.cli`: the command, where no script is installed."""

from ratethrottle.cli import main

raise SystemExit(main())
