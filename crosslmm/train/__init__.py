"""Training: from a configuration to a registered model."""
