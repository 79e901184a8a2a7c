"""Request and reply over NATS: serving endpoints, and asking them."""
