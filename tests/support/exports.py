"""Models as the folders that runs export."""

from pathlib import Path

from crosslmm.config import RunConfig, to_yaml
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.run_folder import MODEL_CONFIG_FILE


def save_exported(
    folder: Path, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, config: RunConfig
) -> None:
    """Save a model as the folder that a run exports."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / MODEL_CONFIG_FILE).write_text(to_yaml(config))
