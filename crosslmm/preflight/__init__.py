"""Checks a run makes of configuration and cluster before it starts."""
