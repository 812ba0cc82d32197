"""What a run will cost: multiply-accumulates, memory, time."""
