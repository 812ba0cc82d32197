"""Search spaces for `python jobs/tune.py --space NAME`: dotted configuration keys -> Tune domains."""
