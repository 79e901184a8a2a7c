"""Simulated nodes and fleets, in virtual time and on the wire."""
