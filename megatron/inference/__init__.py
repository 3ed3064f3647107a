"""Models out of saves, and text out of models."""
