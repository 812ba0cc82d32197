"""RunConfig -> everything that a run's workers must agree upon, and the board on which they pin their news."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.features import REMEDY, DType, Features, Recipe
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.order import Order
from crosslmm.data.pipeline import Layout, block_rows
from crosslmm.data.sampling import Sampling
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.encoder import digest
from crosslmm.model.pretrained import build_config


@dataclass(frozen=True)
class Job:
    """A run, with everything decided that its workers must agree upon. Travels to all of them."""

    config: RunConfig
    folder: str
    """The run's own folder in storage."""
    total_steps: int
    order: Order
    rows: ray.ObjectRef
    lengths: np.ndarray | None
    """About how many tokens each row is, where micro-batches are counted in tokens."""
    validation_size: int
    """Rows of the held-out manifest."""
    validation_rows: ray.ObjectRef | None
    image_size: int
    features: ray.ObjectRef | None
    """`Features` that are read instead of videos."""
    recipe: Recipe | None
    """How they were made."""
    board: Any
    """Actor handle of the `Board`."""

    def training(self, first_step: int, workers: int) -> Layout:
        """What is left of the run after `first_step` steps, for so many workers."""
        steps = self.total_steps - first_step
        rows = block_rows(self.config.data, self.image_size, self.recipe)
        return Layout(self.order, workers, first_step, steps, rows, self.lengths)

    @property
    def collectives_s(self) -> int:
        """How long ranks wait for one another: longer than the watchdog, which knows more about what hangs [s]."""
        return int(2 * max(self.config.watchdog.model_dump().values()))

    def validation(self, workers: int) -> Layout:
        """Validation's "steps" are rounds in which every worker takes one micro-batch."""
        rows = self.config.train.micro_batch_size
        order = Order((self.validation_size,), rows * workers, None)
        return Layout(order, workers, 0, order.steps_per_epoch, rows)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Board:
    """Where workers pin their news and the driver reads them, and the other way round. Posting costs a worker next to
    nothing. It lives on the driver's node, and as long as the driver. News that are lost with its process, were that
    killed, are in the run's folder with the next checkpoint."""

    def __init__(self) -> None:
        self.news: list[tuple[str, Any]] = []
        self.first_step = 0
        self.stopping = False

    def post(self, kind: str, item: Any) -> None:
        """Pin one piece of news."""
        self.news.append((kind, item))

    def take(self) -> list[tuple[str, Any]]:
        """All news since the last call, in order."""
        news, self.news = self.news, []
        return news

    def begin(self, step: int) -> None:
        """The workers go on after this step: what they are given has to begin there."""
        self.first_step = step

    def begins(self) -> int:
        """What `begin` was told last."""
        return self.first_step

    def stop(self) -> None:
        """The driver was told to end the run."""
        self.stopping = True

    def stops(self) -> bool:
        """Whether it was."""
        return self.stopping


def _board() -> Any:
    """A board on this node, which is the driver's: a worker's node may go at any time."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


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
        board=_board(),
    )
