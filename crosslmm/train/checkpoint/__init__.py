"""Checkpoints: state of model and optimizer (`state`), in files (`shards`) that are sealed last (`seals`); saved during
training (`save`), read at a start (`read`), exported as a model (`export`)."""
