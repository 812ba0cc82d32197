"""The Ray Data graph: places of a run -> rows -> frames, in blocks that an equal split keeps in order.

`streaming_split(equal=True)` hands block i to rank i % W as long as all blocks have the same number of rows and none is
cut. So the source emits block numbers, each of which becomes one row: `rows_per_block` consecutive samples *of one rank*.
Ray Data never needs to know what is in them.
"""

import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.collate import Sample
from crosslmm.data.feature_cache import BadFeatures, FeatureCache
from crosslmm.data.feature_format import BF16_BYTES, FeatureRecipe
from crosslmm.data.manifest import BadManifest, Rows
from crosslmm.data.quarantine import QuarantineEntry
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.video.decode_pool import Decoder, Unreadable

Item = TypeVar("Item")
Made = TypeVar("Made")

# A block costs Ray Data 30 to 50 ms whatever it holds, so small samples travel together.
BLOCK_BYTES = 16 * 2**20
BLOCK_ROWS = 128

MAX_SUBSTITUTES = 8
"""Other rows that are tried at the place of an unreadable one; beyond them the place has no weight."""

FATAL_ERRORS = (storage.Refused, storage.Unavailable, BadFeatures, BadManifest)
"""What ends a run, whatever row it happens at."""

EMPTY_ROW: dict[str, Any] = {"manifest": "", "line": 0, "id": "", "kind": None, "messages": []}
"""Stands at the places of a block that no store would give."""


@dataclass(frozen=True)
class BlockLayout:
    """Which places of a run each rank is given, and in what blocks.

    Attributes:
        order: what stands at each place.
        ranks: W, training workers.
        first_step: the step that the first block begins with.
        steps: how many steps follow from there.
        rows_per_block: samples in a block.
        lengths: about how long each row is, float32 (rows,): a step's samples are dealt out so that ranks have equally
            much to do. None deals them out as they stand.
    """

    order: DeterministicSampler
    ranks: int
    first_step: int
    steps: int
    rows_per_block: int
    lengths: np.ndarray | None = None

    @property
    def samples_per_rank(self) -> int:
        """Samples of one rank in one optimizer step."""
        return self.order.global_batch_size // self.ranks

    @property
    def blocks(self) -> int:
        """As many for each rank, one at least; what lies beyond the last step is never asked for."""
        return self.ranks * max(1, -(-self.steps * self.samples_per_rank // self.rows_per_block))

    def positions(self, block: int) -> np.ndarray:
        """Places of the samples in a block, int64 (rows_per_block,). Block i belongs to rank i % ranks."""
        rank, number = block % self.ranks, block // self.ranks
        return self.rank_positions(rank, number * self.rows_per_block + np.arange(self.rows_per_block))

    def rank_positions(self, rank: int, numbers: np.ndarray) -> np.ndarray:
        """Places of a rank's samples, which are numbered from the first step on; int64 (n,) both."""
        step, position = np.divmod(numbers, self.samples_per_rank)
        places = np.empty_like(numbers)
        for one in np.unique(step):
            here = step == one
            places[here] = self._dealt(self.first_step + int(one))[rank][position[here]]
        return places

    def _dealt(self, step: int) -> np.ndarray:
        """Places of a step, int64 (ranks, samples_per_rank). By length the longest go to ranks 0, 1, ..., the next ones to
        ..., 1, 0, and so on."""
        places = step * self.order.global_batch_size + np.arange(self.order.global_batch_size)
        if self.lengths is None:
            return places.reshape(self.ranks, self.samples_per_rank)
        rows, weights = self.order.rows_at(places)
        rounds = places[np.argsort(-self.lengths[rows] * weights, kind="stable")].reshape(
            self.samples_per_rank, self.ranks
        )
        rounds[1::2] = rounds[1::2, ::-1]
        return np.sort(rounds.T, axis=1)


def rows_per_block(data: DataConfig, image_size: int, features: FeatureRecipe | None = None) -> int:
    """Samples in a block: as many as fit 16 MiB of frames, or of the features that are read instead, 1 to 128."""
    frame = image_size**2 * 3 if features is None else features.patches * features.width * BF16_BYTES
    return int(np.clip(BLOCK_BYTES // (data.num_frames * frame), 1, BLOCK_ROWS))


def build_dataset(
    layout: BlockLayout,
    rows: ray.ObjectRef,
    data: DataConfig,
    image_size: int,
    workers: int,
    cpus_per_worker: float,
    features: ray.ObjectRef | None = None,
    decode_on: Mapping[str, str] | None = None,
) -> Dataset:
    """The dataset of a layout. Call it in the process that will run it (Train's controller): Ray's context is local.

    Args:
        layout: what goes where.
        rows: `Rows` of the manifests, in the object store, or what else can `take` and has their `roots`.
        data: frames, decoder, deadline.
        image_size: side of a frame [px].
        workers: decoding processes.
        cpus_per_worker: CPUs that each of them reserves.
        features: `FeatureCache`, in the object store, that are read instead of videos.
        decode_on: labels of the nodes on which it reads and decodes; None for any.
    """
    context = DataContext.get_current()
    context.target_max_block_size = 1  # bytes: no two rows ever share a block, and a row cannot be cut
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # while validation runs, training's data stands still
    # One task that counts, as far ahead as the readers need: tasks of their own for millions of blocks would be made
    # before the first one runs. It takes no CPU, which the readers could wait for in silence, and counts on this node:
    # readers' nodes come and go.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    numbers = ray.data.read_datasource(
        _BlockNumbers(layout.blocks), override_num_blocks=1, num_cpus=0, label_selector=here
    )
    return numbers.map_batches(
        ReadSamples,
        batch_size=None,
        # While one block is packed and put into the object store, the child decodes the next one.
        compute=ray.data.ActorPoolStrategy(
            size=workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=cpus_per_worker,
        label_selector=dict(decode_on) if decode_on else None,
        fn_constructor_kwargs={
            "layout": layout,
            "rows": rows,
            "data": data,
            "image_size": image_size,
            "features": features,
        },
    )


class _BlockNumbers(Datasource):
    """0, 1, 2, ..., one in a block."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self.count

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(self._read, self.count), metadata)]

    @staticmethod
    def _read(count: int) -> Iterator[pa.Table]:
        for number in range(count):
            yield pa.table({"block": [number]})


class ReadSamples:
    """Block number -> that block's samples, read and decoded. Runs as a Ray Data actor, two blocks at a time."""

    def __init__(
        self,
        layout: BlockLayout,
        rows: ray.ObjectRef,
        data: DataConfig,
        image_size: int,
        features: ray.ObjectRef | None = None,
    ) -> None:
        self.layout = layout
        self.rows: Rows = ray.get(rows)
        data = data.model_copy(update={"roots": self.rows.roots})
        self.decoder: Decoder | FeatureCache = Decoder(data, image_size) if features is None else ray.get(features)
        self.unreadable: dict[int, QuarantineEntry] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One row: all samples' frames (or features), one behind the other, and what else `Sample` holds, as JSON.

        In training a row that cannot be read is replaced by another one; in validation it keeps its place, without
        frames and with the reason in `error`. Both are named in `bad`.
        """
        places = self.layout.positions(int(batch["block"][0]))
        index, weight = self.layout.order.rows_at(places)
        stopped = None
        try:
            rows, videos, bad = self._read_or_replace(places, index, weight)
        except FATAL_ERRORS as error:
            # Raised here it would reach the trainer's log under Ray's own tracebacks; `unpack_block` raises it again.
            stopped = [isinstance(error, kind) for kind in FATAL_ERRORS].index(True), str(error)
            rows, videos, bad = [EMPTY_ROW] * len(index), [[] for _ in index], [[] for _ in index]
        samples, frames = [], []
        for i, (row, found) in enumerate(zip(rows, videos, strict=True)):
            readable = [] if isinstance(found, QuarantineEntry) else found
            frames += readable
            samples.append(
                {key: row[key] for key in ("manifest", "line", "id", "kind", "messages")}
                | {
                    "position": int(places[i]),
                    "weight": float(weight[i]),
                    "videos": [len(video) for video in readable],
                    "error": found.reason if isinstance(found, QuarantineEntry) else None,
                    "quarantined": bad[i],
                }
            )
        packed = np.empty(1, dtype=object)
        packed[0] = np.concatenate(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)
        return {"frames": packed, "samples": [json.dumps(samples)], "stopped": [json.dumps(stopped)]}

    def _read_or_replace(
        self, places: np.ndarray, index: np.ndarray, weight: np.ndarray
    ) -> tuple[list[dict[str, Any]], list[list[np.ndarray] | QuarantineEntry], list[list[dict[str, Any]]]]:
        """The rows that stand at each place in the end, their videos, and the entries of all rows that could not be
        read there."""
        rows: list[dict[str, Any]] = [EMPTY_ROW] * len(index)
        videos: list[list[np.ndarray] | QuarantineEntry] = [[] for _ in index]
        bad: list[list[dict[str, Any]]] = [[] for _ in index]
        waiting = list(range(len(index)))
        for attempt in range(1, MAX_SUBSTITUTES + 2):
            numbers = index[waiting]
            taken = self.rows.take(numbers)
            for i, row, found in zip(waiting, taken, self._read(numbers.tolist(), taken), strict=True):
                rows[i], videos[i] = row, found
                if isinstance(found, QuarantineEntry):
                    bad[i].append(found.to_dict())
            waiting = [i for i in waiting if isinstance(videos[i], QuarantineEntry) and weight[i]]
            if self.layout.order.seed is None or not waiting or attempt > MAX_SUBSTITUTES:
                break
            for i in waiting:
                index[i] = self.layout.order.substitute(int(places[i]), attempt)
        return rows, videos, bad

    def _read(self, numbers: list[int], rows: list[dict[str, Any]]) -> list[list[np.ndarray] | QuarantineEntry]:
        """The videos of some rows, or what is wrong with one of them. What is known to be bad is not tried again."""
        new = {number: row for number, row in zip(numbers, rows, strict=True) if number not in self.unreadable}
        decoded = iter(self.decoder([uri for row in new.values() for uri in row["videos"]]))
        found: dict[int, list[np.ndarray]] = {}
        for number, row in new.items():
            found[number] = []
            for uri in row["videos"]:
                video = next(decoded)
                if isinstance(video, Unreadable):
                    self.unreadable[number] = QuarantineEntry.from_row(row, uri, video)
                else:
                    found[number].append(video)
        return [self.unreadable.get(number, found.get(number, [])) for number in numbers]


def unpack_block(block: dict[str, np.ndarray]) -> Iterator[Sample]:
    """A block as Ray Data delivers it -> its samples.

    Raises:
        storage.Unavailable: the store of the videos cannot be used.
        BadFeatures: features must not be used.
        BadManifest: a prepared row names a video outside of the roots.
    """
    if stopped := json.loads(block["stopped"][0]):
        kind, message = stopped
        raise FATAL_ERRORS[kind](message)
    frames, start = block["frames"][0], 0
    for said in json.loads(block["samples"][0]):
        videos = []
        for count in said.pop("videos"):
            # Ray's blocks are views of shared memory, which torch would rather not write to.
            videos.append(np.array(frames[start : start + count]))
            start += count
        yield Sample(videos=videos, **said)


def prefetch(items: Iterable[Item], make: Callable[[Item], Made], depth: int = 2) -> Iterator[Made]:
    """`map(make, items)`, with the next `depth` results made in a thread while this one is used, from now on."""
    source = iter(items)
    end = object()

    def produce() -> Any:
        item = next(source, end)
        return end if item is end else make(item)  # type: ignore[arg-type]

    thread = ThreadPoolExecutor(max_workers=1)
    waiting = deque(thread.submit(produce) for _ in range(depth))

    def made_one_by_one() -> Iterator[Made]:
        try:
            while (made := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(produce))
                yield made
        finally:
            thread.shutdown(cancel_futures=True)

    return made_one_by_one()
