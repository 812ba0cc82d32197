"""Scores a model on benchmarks: questions from a folder, answers on Ray, scores with intervals, a page, MLflow."""
