"""Arithmetic about a run before it starts: operations, memory, time."""
