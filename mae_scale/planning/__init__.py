"""Planning of a run before it starts: operations, memory, time and the choice of settings."""
