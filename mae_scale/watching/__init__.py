"""Looking at runs from outside, without torch."""
