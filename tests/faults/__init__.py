"""The fault board: what the limiter must survive, provoked on real servers, and judged from what each process logged.

`make faults` runs it, `make faults-short` a part of it, `make soak` draws faults at random. One row of the board is one function
in `rows`; `fleet` runs the worker processes, `proxy` stands between them and Redis, `judge` says what the logs hold.
"""
