"""How the features of a run are made, and whether stored ones were made that way."""

from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.feature_cache import REENCODE_HINT, FeatureCache
from crosslmm.data.feature_format import DType, FeatureRecipe
from crosslmm.data.manifest import Rows
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.loading import build_config
from crosslmm.model.vision_encoder import digest


def open_features(config: RunConfig, rows: Rows) -> FeatureCache | None:
    """The features that a run reads instead of videos, if it does.

    Args:
        config: the run.
        rows: of training and validation.

    Raises:
        BadConfig: they were made otherwise than the run would make them, or not of all its videos.
    """
    if config.data.features is None:
        return None
    features = FeatureCache(config.data.features)
    features.require(recipe_of(config, encoder="", dtype="bf16"), rows.videos())
    return features


def recipe_of(config: RunConfig, encoder: str, dtype: DType) -> FeatureRecipe:
    """How the features of a run's videos are made, by an encoder of this digest."""
    model = build_config(config.model)
    vision = model.vision_config
    return FeatureRecipe.from_config(
        config.data,
        vision.image_size,
        config.train.precision,
        model.patches_per_frame,
        vision.hidden_size,
        encoder,
        dtype,
    )


def require_encoder(model: CrossLMMForConditionalGeneration, recipe: FeatureRecipe, folder: str) -> None:
    """Whether features were made by this model's own encoder.

    Raises:
        BadConfig: by another one.
    """
    if digest(model.vision_tower) != recipe.encoder:
        raise BadConfig(f"data.features: {folder} was made by another encoder than this run's; {REENCODE_HINT}")
