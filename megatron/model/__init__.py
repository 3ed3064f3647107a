"""The BLOOM language model, and what follows from its shape."""
