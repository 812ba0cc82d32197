"""From a manifest to batches. Knows no model."""
