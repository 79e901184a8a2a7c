"""Credentials: who there is, what each may do, and the files that say so to servers and services.

`roles` is the table, pure. `keys` and `certificates` make secrets, `folder` keeps them, `configuration` is what servers read.
"""
