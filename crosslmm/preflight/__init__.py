"""Checks that every run makes of its configuration and cluster before it starts workers."""
