"""This process and its copies: forks, worker processes, memory, logs, the version."""
