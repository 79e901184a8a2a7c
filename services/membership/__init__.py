"""A node's own side of its place in a fleet: it registers, heartbeats, hears what the fleet concludes of it, and leaves."""
