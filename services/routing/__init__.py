"""Routing decisions: pure functions of the fold, the router's overlay, the request and the time.

`decide` is the whole decision, `policies` the costs, `overlay` what the router has decided but not yet seen on the log.
"""
