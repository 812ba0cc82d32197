"""Predict what a run costs before renting machines: multiply-accumulates, memory, time and price."""
