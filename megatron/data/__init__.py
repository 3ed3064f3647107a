"""Training data: token files on disk, samples cut from them, and the microbatches of each rank."""
