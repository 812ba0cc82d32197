"""Judges answers and scores them."""
