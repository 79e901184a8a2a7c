"""A request's way to an engine and back."""
