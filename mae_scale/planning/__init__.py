"""What a run needs and gets, by arithmetic: operations, memory, time."""
