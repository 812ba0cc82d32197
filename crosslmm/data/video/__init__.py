"""Video bytes to frames: probing, decoding backends, and a pool of decoder processes."""
