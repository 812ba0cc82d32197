"""Generated sample sets: H.264 clips with questions."""
