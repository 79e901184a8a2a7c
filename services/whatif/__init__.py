"""Recorded requests once more, through another policy on simulated nodes."""
