"""What runs: the embedded server, router, coordinator, simulated nodes and the command line.

`routing` and `placement` hold the decisions, as pure functions over the projections; everything else here does I/O.
"""
