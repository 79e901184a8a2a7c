"""A replica of the fleet: follows the log, compares digests with the others, takes snapshots."""
