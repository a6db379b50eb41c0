"""Processes of a run: how they meet, watch each other, are stopped, and what they print."""
