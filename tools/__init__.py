"""Command-line tools around training."""
