"""The demonstration: a real fleet on this machine that shows each feature, is killed, and comes back.

`workload` makes the requests, `fleet` starts and kills processes, `traffic` sends requests, `features` are the steps that
are checked one by one, `run` is the order of things and the result.
"""
