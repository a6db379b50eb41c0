"""Watching runs from outside, by their folders and without torch."""
