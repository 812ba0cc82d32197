"""What the ranks of a run do together: find one another, exchange plain data, shard the model."""
