"""The recipe of a run's features, and checks that stored features match it."""

from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.feature_cache import REENCODE_HINT, FeatureCache
from crosslmm.data.feature_format import DType, FeatureRecipe
from crosslmm.data.manifest import Rows
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.loading import build_config
from crosslmm.model.vision_encoder import digest


def open_features(config: RunConfig, rows: Rows) -> FeatureCache | None:
    """Open the features that a run reads instead of videos; None if it reads videos.

    Args:
        config: the run.
        rows: rows of training and validation.

    Raises:
        BadConfig: the features were made by another recipe, or do not contain all videos of the run.
    """
    if config.data.features is None:
        return None
    features = FeatureCache(config.data.features)
    features.require(recipe_of(config, encoder="", dtype="bf16"), rows.videos())
    return features


def recipe_of(config: RunConfig, encoder: str, dtype: DType) -> FeatureRecipe:
    """Return the recipe of a run's features.

    Args:
        config: the run.
        encoder: digest of the encoder.
        dtype: format that the features are stored in.
    """
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
    """Check that the features in `folder` were made by this model's encoder.

    Raises:
        BadConfig: they were made by another one.
    """
    if digest(model.vision_tower) != recipe.encoder:
        raise BadConfig(f"data.features: {folder} was made by another encoder than this run's; {REENCODE_HINT}")
