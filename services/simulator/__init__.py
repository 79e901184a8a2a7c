"""A fleet in virtual time: simulated engines, an event loop, and the fold and the policies that routers really use.

`hardware` is how long a step takes, `engine` one node, `world` the loop that joins nodes, log and routers, `results` what
came out, `workloads` requests for those who have no trace, `compare` several runs, `plot` and `report` what is shown.
"""
