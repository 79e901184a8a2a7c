"""What travels between services and those who ask them: messages, errors, labels, trace context. Pure."""
