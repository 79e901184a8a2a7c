"""docs/history.md: a tutorial whose answers are made by asking them of a simulated fleet's history."""
