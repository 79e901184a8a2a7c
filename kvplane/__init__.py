"""Control plane of a fleet of LLM inference servers.

The one name that an installation adds. `events`, `projections` and `services` are folders of the repository's top level; here
they are links, and in the wheel they lie inside.
"""
