"""A device that is not there, to find on a CPU what would only show on a GPU."""
