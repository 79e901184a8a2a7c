"""What a service shows of itself: metrics, health, whether its connection lives."""
