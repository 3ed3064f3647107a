"""Models out of saves, text out of models, and exports that others open."""
