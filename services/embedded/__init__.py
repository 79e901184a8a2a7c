"""A NATS server that kvplane starts and keeps running."""
