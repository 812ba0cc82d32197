"""Runs the frozen vision encoder over all videos of a run and stores the features."""
