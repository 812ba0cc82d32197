"""Answer questions about videos with an exported or registered model."""
