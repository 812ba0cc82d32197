"""Converts pretrained weights of other layouts to those that `model.*_weights` takes."""
