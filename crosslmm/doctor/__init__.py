"""The long preflight check of a cluster: every node's report, an all-reduce, and two steps of the run itself."""
