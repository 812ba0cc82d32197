"""The Ray Data pipeline: positions of a run become rows, then frames, in blocks that an equal split keeps in order.

`streaming_split(equal=True)` gives block i to rank i % W as long as all blocks have the same number of rows and none is
cut. So the source emits block numbers, and each number becomes one Ray Data row, which holds `rows_per_block`
consecutive samples *of one rank*. Ray Data never looks into it.
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
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import BadManifest, Rows
from crosslmm.data.quarantine import QuarantineEntry
from crosslmm.data.sampler import PADDING, DeterministicSampler
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.data.video.frame_list import describe_video

Item = TypeVar("Item")
Result = TypeVar("Result")

# A block costs Ray Data 30 to 50 ms whatever its size, so small samples share one.
MAX_BLOCK_BYTES = 16 * 2**20
"""Size of the frames or features of a block, at most, if each sample has one video and none is larger [bytes]."""
MAX_BLOCK_ROWS = 128
"""Largest number of samples in a block."""

MAX_SUBSTITUTES = 8
"""Largest number of rows that are tried in place of an unreadable one; if none can be read, the sample has weight 0."""

FATAL_ERRORS = (storage.Refused, storage.Unavailable, BadFeatures, BadManifest)
"""Errors that end a run, whichever row they occur at."""

EMPTY_ROW: dict[str, Any] = {"manifest": "", "line": 0, "id": "", "kind": None, "messages": [], "videos": []}
"""Stands for each sample of a block that a fatal error interrupted."""


@dataclass(frozen=True)
class BlockLayout:
    """Assigns the positions of a run to ranks and blocks.

    Attributes:
        sampler: maps positions to rows.
        ranks: W, number of training workers.
        first_step: optimizer step that the first block begins with.
        steps: number of steps from there.
        rows_per_block: samples in a block.
        lengths: estimated tokens of each row, float32 (rows,): the samples of a step are dealt to ranks so that all
            have about as many tokens. None deals them in the sampler's order.
    """

    sampler: DeterministicSampler
    ranks: int
    first_step: int
    steps: int
    rows_per_block: int
    lengths: np.ndarray | None = None

    @property
    def samples_per_rank(self) -> int:
        """Samples of one rank in one optimizer step, padding included: all ranks have equally many."""
        return -(-self.sampler.global_batch_size // self.ranks)

    @property
    def num_blocks(self) -> int:
        """Total number of blocks: equally many per rank, at least one. The last ones may have samples of steps after
        the last one, which nobody trains on."""
        return self.ranks * max(1, -(-self.steps * self.samples_per_rank // self.rows_per_block))

    def positions(self, block: int) -> np.ndarray:
        """Return the positions of the samples in a block, int64 (rows_per_block,), `PADDING` for none. Block i is for
        rank i % ranks."""
        rank, number = block % self.ranks, block // self.ranks
        return self.rank_positions(rank, number * self.rows_per_block + np.arange(self.rows_per_block))

    def rank_positions(self, rank: int, numbers: np.ndarray) -> np.ndarray:
        """Return the positions of a rank's samples by their numbers, counted from `first_step` on; both int64 (n,)."""
        step_numbers, within = np.divmod(numbers, self.samples_per_rank)
        positions = np.empty_like(numbers)
        for step in np.unique(step_numbers):
            mask = step_numbers == step
            positions[mask] = self._deal(self.first_step + int(step))[rank][within[mask]]
        return positions

    def _deal(self, step: int) -> np.ndarray:
        """Deal the positions of a step to ranks, int64 (ranks, samples_per_rank): equally many, or one
        fewer and `PADDING`.

        With `lengths`, the longest samples go to ranks 0, 1, ..., W-1, the next ones to W-1, ..., 1, 0, and so on.
        """
        positions = step * self.sampler.global_batch_size + np.arange(self.sampler.global_batch_size)
        if self.lengths is None:
            shares = np.full((self.ranks, self.samples_per_rank), PADDING)
            for rank, share in enumerate(np.array_split(positions, self.ranks)):
                shares[rank, : len(share)] = share
            return shares
        rows, weights = self.sampler.rows_at(positions)
        longest_first = positions[np.argsort(-self.lengths[rows] * weights, kind="stable")]
        padding = np.full(self.ranks * self.samples_per_rank - len(positions), PADDING)
        rounds = np.append(longest_first, padding).reshape(self.samples_per_rank, self.ranks)
        rounds[1::2] = rounds[1::2, ::-1]
        return np.sort(rounds.T, axis=1)


def rows_per_block(data: DataConfig, image_size: int, features: FeatureRecipe | None = None) -> int:
    """Return the number of samples in a block, 1 to 128: as many as fit into 16 MiB of frames (or of features), if each
    has one video of `num_frames` frames."""
    frame_bytes = image_size**2 * 3 if features is None else features.patches * features.width * BF16_BYTES
    return int(np.clip(MAX_BLOCK_BYTES // (data.num_frames * frame_bytes), 1, MAX_BLOCK_ROWS))


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
    """Build the dataset of a layout.

    Call it in the process that runs the dataset (Ray Train's controller): Ray Data's context is local to a process.

    Args:
        layout: assigns samples to blocks.
        rows: `Rows` in the object store, or another object with `take` and `roots`.
        data: frames, decoder, deadline.
        image_size: side of a frame [px].
        workers: decoding processes.
        cpus_per_worker: CPUs that each of them reserves.
        features: `FeatureCache` in the object store, which is read instead of videos.
        decode_on: labels of the nodes that read and decode; None for any.
    """
    context = DataContext.get_current()
    context.target_max_block_size = 1  # bytes: no two rows ever share a block, and a row cannot be cut
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # during validation the training data makes no progress
    # A single task emits the numbers, only as far ahead as the readers need: with a task per block, millions of tasks
    # would be created before the first one runs. It reserves no CPU: with none free it would not start, and the readers
    # would silently wait for its numbers. It runs on this node, since nodes of readers come and go.
    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    numbers = ray.data.read_datasource(
        _BlockNumbers(layout.num_blocks), override_num_blocks=1, num_cpus=0, label_selector=this_node
    )
    return numbers.map_batches(
        ReadSamples,
        batch_size=None,
        # While one block is packed and put into the object store, the child process decodes the next one.
        compute=ray.data.ActorPoolStrategy(
            size=workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=cpus_per_worker,
        memory=None if features else int(data.decode_memory_gib * 2**30),  # of the child process that decodes
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
    """Emits 0, 1, 2, ..., each in a block of its own."""

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
    """Reads and decodes the samples of a block. Runs as a Ray Data actor, two blocks at a time."""

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
        """Read a block and return it as one row, which `unpack_block` unpacks.

        `frames` has the frames (or features) of all samples, concatenated; `samples` the other fields of `Sample`, as
        JSON; `stopped` the fatal error, if there is one.

        In training another row replaces an unreadable one. In validation it keeps its position, without frames and with
        the reason in `error`. All unreadable rows that were tried are listed in `quarantined`.
        """
        positions = self.layout.positions(int(batch["block"][0]))
        is_sample = positions != PADDING
        index, weight = self.layout.sampler.rows_at(np.where(is_sample, positions, 0))
        weight *= is_sample
        stopped = None
        try:
            rows, videos, quarantined = self._read_or_replace(positions, index, weight)
        except FATAL_ERRORS as error:
            # Raised here, it would be buried under Ray's tracebacks; `unpack_block` raises it in the trainer.
            stopped = [isinstance(error, kind) for kind in FATAL_ERRORS].index(True), str(error)
            rows, videos, quarantined = [EMPTY_ROW] * len(index), [[] for _ in index], [[] for _ in index]
        samples, frames = [], []
        for i, (row, result) in enumerate(zip(rows, videos, strict=True)):
            readable = [] if isinstance(result, QuarantineEntry) else result
            frames += [video.images for video in readable]
            samples.append(
                {key: row[key] for key in ("manifest", "line", "id", "kind", "messages")}
                | {
                    "position": int(positions[i]),
                    "weight": float(weight[i]),
                    "videos": [len(video) for video in readable],
                    "error": result.reason if isinstance(result, QuarantineEntry) else None,
                    "quarantined": quarantined[i],
                    "times": [video.times.tolist() for video in readable],
                    "shortfalls": [
                        f"{describe_video(uri)}: {video.shortfall}"
                        for uri, video in zip(row["videos"], readable, strict=False)
                        if video.shortfall
                    ],
                }
            )
        packed = np.empty(1, dtype=object)
        packed[0] = np.concatenate(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)
        return {"frames": packed, "samples": [json.dumps(samples)], "stopped": [json.dumps(stopped)]}

    def _read_or_replace(
        self, positions: np.ndarray, index: np.ndarray, weight: np.ndarray
    ) -> tuple[list[dict[str, Any]], list[list[SampledFrames] | QuarantineEntry], list[list[dict[str, Any]]]]:
        """Read the rows `index`; in training replace unreadable ones, in `index` too.

        Returns:
            (rows, videos, quarantined), one element for each position: the final row, its videos or its quarantine
            entry, and the quarantine entries of all rows that were tried there.
        """
        rows: list[dict[str, Any]] = [EMPTY_ROW] * len(index)
        videos: list[list[SampledFrames] | QuarantineEntry] = [[] for _ in index]
        quarantined: list[list[dict[str, Any]]] = [[] for _ in index]
        pending = np.flatnonzero(positions != PADDING).tolist()
        for attempt in range(1, MAX_SUBSTITUTES + 2):
            if not pending:
                break
            numbers = index[pending]
            taken = self.rows.take(numbers)
            for i, row, result in zip(pending, taken, self._read(numbers.tolist(), taken), strict=True):
                rows[i], videos[i] = row, result
                if isinstance(result, QuarantineEntry):
                    quarantined[i].append(result.to_dict())
            pending = [i for i in pending if isinstance(videos[i], QuarantineEntry) and weight[i]]
            if self.layout.sampler.seed is None or attempt > MAX_SUBSTITUTES:
                break
            for i in pending:
                index[i] = self.layout.sampler.substitute(int(positions[i]), attempt)
        return rows, videos, quarantined

    def _read(self, numbers: list[int], rows: list[dict[str, Any]]) -> list[list[SampledFrames] | QuarantineEntry]:
        """Return the videos of each row, or a quarantine entry if one of them cannot be read. Known unreadable rows are
        not tried again."""
        new = {number: row for number, row in zip(numbers, rows, strict=True) if number not in self.unreadable}
        decoded = iter(self.decoder([uri for row in new.values() for uri in row["videos"]]))
        videos: dict[int, list[SampledFrames]] = {}
        for number, row in new.items():
            videos[number] = []
            for uri in row["videos"]:
                video = next(decoded)
                if isinstance(video, VideoFailure):
                    self.unreadable[number] = QuarantineEntry.from_row(row, uri, video)
                else:
                    videos[number].append(video)
        return [self.unreadable.get(number, videos.get(number, [])) for number in numbers]


def unpack_block(block: dict[str, np.ndarray]) -> Iterator[Sample]:
    """Yield the samples of a block, as `ReadSamples` made it and Ray Data delivers it.

    Raises:
        storage.Refused, storage.Unavailable: the store of the videos cannot be used.
        BadFeatures: stored features are missing, damaged, or of another version of the video.
        BadManifest: a prepared row names a video outside of the roots.
    """
    if stopped := json.loads(block["stopped"][0]):
        kind, message = stopped
        raise FATAL_ERRORS[kind](message)
    frames, start = block["frames"][0], 0
    for fields in json.loads(block["samples"][0]):
        videos = []
        for count in fields.pop("videos"):
            # Ray's blocks are read-only views of shared memory; torch warns about arrays that it cannot write to.
            videos.append(np.array(frames[start : start + count]))
            start += count
        yield Sample(videos=videos, **fields)


def prefetch(items: Iterable[Item], make: Callable[[Item], Result], depth: int = 2) -> Iterator[Result]:
    """Return an iterator like `map(make, items)` that prepares the next `depth` results in a thread, starting at once.

    An exception that `items` or `make` raises is raised at its position in the results, which end there.
    """
    source = iter(items)
    end = object()

    def produce() -> Any:
        item = next(source, end)
        return end if item is end else make(item)  # type: ignore[arg-type]

    thread = ThreadPoolExecutor(max_workers=1)
    pending = deque(thread.submit(produce) for _ in range(depth))

    def results() -> Iterator[Result]:
        try:
            while (result := pending.popleft().result()) is not end:
                pending.append(thread.submit(produce))
                yield result
        finally:
            thread.shutdown(cancel_futures=True)

    return results()
