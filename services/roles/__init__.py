"""The services that answer for a fleet: router and coordinator."""
