"""Asks a model the questions, on Ray."""
