"""The ways to compute attention other than by its definition."""
