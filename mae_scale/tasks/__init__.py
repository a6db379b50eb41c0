"""The tasks that train, one module each, and what they share."""
