"""RunConfig -> what a run reads, and the `Job` that its workers are given."""

import numpy as np
import ray

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.features import REMEDY, DType, Features, Recipe
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.order import Order
from crosslmm.data.sampling import Sampling
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.encoder import digest
from crosslmm.model.pretrained import build_config
from crosslmm.train import board
from crosslmm.train.job import Job


def open_features(config: RunConfig, rows: Rows) -> Features | None:
    """The features that a run reads instead of videos, if it does.

    Args:
        config: the run.
        rows: of training and validation.

    Raises:
        BadConfig: they were made otherwise than the run would make them, or not of all its videos.
    """
    if config.data.features is None:
        return None
    features = Features(config.data.features)
    features.require(recipe_of(config, encoder="", dtype="bf16"), rows.videos())
    return features


def recipe_of(config: RunConfig, encoder: str, dtype: DType) -> Recipe:
    """How the features of a run's videos are made, by an encoder of this digest."""
    model = build_config(config.model)
    vision = model.vision_config
    return Recipe.of(
        config.data,
        vision.image_size,
        config.train.precision,
        model.patches_per_frame,
        vision.hidden_size,
        encoder,
        dtype,
    )


def require_encoder(model: CrossLMMForConditionalGeneration, recipe: Recipe, folder: str) -> None:
    """Whether features were made by this model's own encoder.

    Raises:
        BadConfig: by another one.
    """
    if digest(model.vision_tower) != recipe.encoder:
        raise BadConfig(f"data.features: {folder} was made by another encoder than this run's; {REMEDY}")


def prepare(
    config: RunConfig, manifests: list[Manifest], validation: Manifest | None, features: Features | None
) -> Job:
    """Decide what workers must agree upon, and hand the rows to Ray."""
    train, data = config.train, config.data
    order = Order(
        tuple(len(manifest) for manifest in manifests),
        train.global_batch_size,
        config.seed,
        tuple(data.manifests.values()),
    )
    steps = train.epochs * order.steps_per_epoch
    model = build_config(config.model)
    sampling = Sampling(data.num_frames, data.sampling, data.fps)
    lengths = [
        manifest.lengths(sampling, model.tokens_per_frame) for manifest in manifests * bool(train.micro_batch_tokens)
    ]
    return Job(
        config=config,
        folder=storage.join(config.storage, str(config.name)),
        total_steps=min(steps, train.max_steps or steps),
        order=order,
        rows=ray.put(Rows(manifests)),
        lengths=np.concatenate(lengths) if lengths else None,
        validation_size=len(validation) if validation else 0,
        validation_rows=ray.put(Rows([validation])) if validation else None,
        image_size=model.vision_config.image_size,
        features=ray.put(features) if features else None,
        recipe=features.recipe if features else None,
        board=board.put_up(),
    )
