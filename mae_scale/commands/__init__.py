"""The commands that do not train, and those that only read a run."""
