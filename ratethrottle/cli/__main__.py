"""`python -m ratethrottle.cli`: the command, if no script is installed."""

from ratethrottle.cli import main

raise SystemExit(main())
