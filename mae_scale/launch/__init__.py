"""Processes of a run: how they start together, watch each other, stop, and print."""
