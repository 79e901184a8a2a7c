"""Chaos: a fleet of real processes under load, faults drawn from a seed, and a checker that reads the log afterwards.

`world` runs the processes, `network` cuts them off, `faults` draws and plays the schedule, `load` is the clients, `ledger`
holds what was acknowledged to them, `checker` judges the log, `rest` looks at replicas, snapshots and history, `report` writes.
"""
