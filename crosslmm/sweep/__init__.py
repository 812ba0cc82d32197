"""Sweeps: search spaces, trials under Ray Tune, and the report of accuracy against compute."""
