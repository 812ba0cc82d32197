"""From a configuration to a trained, registered model."""
