"""The config of a run: its sections, how they are read, and what makes a run the same run."""
