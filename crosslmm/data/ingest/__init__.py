"""The verbs of jobs/prepare.py: split a manifest, check its rows in parallel, write shards, retry unreadable videos."""
