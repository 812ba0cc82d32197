"""What to search: dotted paths of the configuration -> Tune domains. `python jobs/tune.py --space NAME` takes one."""
