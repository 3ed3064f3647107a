"""Engines: what drives forward, backward and the update."""
