"""Needles in long videos: what a model finds, by length and depth."""
