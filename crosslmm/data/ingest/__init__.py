"""The commands of jobs/prepare.py: split a manifest, check its rows in parallel, write it, retry unreadable videos."""
