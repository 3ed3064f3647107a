"""What a run chooses by itself, by measuring: attention backend and micro-batch size."""
