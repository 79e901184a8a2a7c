"""What is true now: pure folds of the log.

`fleet` is the one state made of the others: `nodes`, `prefix` (which node holds which blocks), `sessions`, `load` and
`recency`. `digest` says in 128 bits what a state is, so that replicas can be compared.
"""
