"""What a decision costs, here and at the peers. `python -m benchmarks --help`."""
