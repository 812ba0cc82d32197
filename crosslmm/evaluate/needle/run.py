"""The search: for each length, depth and number of hops, questions about needles in the haystack."""

import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosslmm import scoring
from crosslmm.config import BadConfig, TrackingConfig
from crosslmm.data.samples import needles
from crosslmm.evaluate.asking.model_files import ModelFiles, fetch_model, open_files
from crosslmm.evaluate.evaluation_folder import EvaluationFolder
from crosslmm.evaluate.needle import heat_map
from crosslmm.evaluate.needle.cell import Cell, ScoredAnswer
from crosslmm.evaluate.needle.haystack import Haystack
from crosslmm.evaluate.needle.settings import NeedleSettings
from crosslmm.evaluate.scores import intervals
from crosslmm.evaluate.scores.intervals import Estimate
from crosslmm.inference.answerer import Answerer
from crosslmm.inference.streaming import stream_answer
from crosslmm.text import safe_name
from crosslmm.tracking.versions import EvaluationRecord, record_evaluation

log = logging.getLogger(__name__)

ANSWER_TOKENS = 8
"""Length limit of an answer: room for a colour, and for more, since an answer that goes on is a wrong one [tokens]."""
CELLS_FILE, PAGE_FILE = "cells.json", "needle.html"


@dataclass(frozen=True)
class NeedleResult:
    """Result of a search; the last line of jobs/needle.py."""

    name: str
    folder: str
    model: str
    accuracy: dict[str, Any]
    """Of all cells that fit the decoder's context: `value`, `low`, `high`, `count`, `clusters`."""
    cells: list[dict[str, Any]]
    """`frames`, `depth` [%], `hops`, `right`, `asked`, `seconds` per question, `memory_bytes`, `error`."""
    page: str
    run_id: str
    seconds: float


def run_search(settings: NeedleSettings, tracking: TrackingConfig) -> NeedleResult:
    """Search for needles, record what was found, and return it. Cells that an earlier start has finished stay.

    Raises:
        BadConfig: the model or the haystack cannot be used.
        ConnectionError: MLflow does not answer.
    """
    began = time.monotonic()
    model = fetch_model(settings.model, tracking)
    identity = _identity(settings, model)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = settings.name or safe_name(f"{_label(settings)}-{model.label}-{digest[:8]}", 100)
    folder = EvaluationFolder(settings.storage, name)
    begun = folder.begin(identity, settings.videos)
    log.info("model     %s\nfolder    %s", model.uri, folder.uri)
    cells = list(_search(settings, model, folder))
    estimate = _accuracy(cells)
    heat_map.print_map(cells, settings)
    page = folder.write(PAGE_FILE, heat_map.page(cells, estimate, model.uri, settings).encode())
    cells_data = json.dumps([asdict(cell) for cell in cells]).encode()
    folder.write(CELLS_FILE, cells_data)
    record = EvaluationRecord(
        name=name,
        key=begun["key"],
        benchmark=_label(settings),
        params=identity | {"model": model.uri, "folder": folder.uri},
        metrics=_metrics(cells, estimate),
        data_uri=settings.haystack[0] if settings.haystack else folder.uri,
        data_digest=digest,
        questions=estimate.count,
        files={PAGE_FILE: folder.read(PAGE_FILE) or b"", CELLS_FILE: cells_data},
    )
    run_id = record_evaluation(record, model.version, tracking)
    seconds = round(time.monotonic() - began, 1)
    lines = [cell.line() for cell in cells]
    return NeedleResult(name, folder.uri, model.uri, asdict(estimate), lines, page, run_id, seconds)


def _label(settings: NeedleSettings) -> str:
    """Return the score's name. Searches that cannot be compared (with closed gates, say) have different ones."""
    closed = [f"without-{branch}" for branch in ("v2v", "t2v") if not getattr(settings, branch)]
    return ".".join(["needle", *closed, *(["film"] if settings.haystack else [])])


def _identity(settings: NeedleSettings, model: ModelFiles) -> dict[str, Any]:
    """Return what the answers depend on."""
    keys = ("frames", "depths", "hops", "videos", "haystack", "v2v", "t2v", "seed")
    return {"model": model.uri, "model_sha256": model.digest, **{key: getattr(settings, key) for key in keys}}


def _search(settings: NeedleSettings, model: ModelFiles, folder: EvaluationFolder) -> Iterator[Cell]:
    """Yield all cells, the finished ones from their files."""
    asked = [(n, depth, hops) for hops in settings.hops for n in settings.frames for depth in settings.depths]
    stored = {cell: folder.read(_file(*cell)) for cell in asked}
    if all(stored.values()):
        yield from (Cell.from_json(data or b"") for data in stored.values())
        return
    answerer = open_files(model.files, settings.device)
    if answerer.processor.timestamps:
        raise BadConfig(f"{model.uri}: reads the time of each frame (data.timestamps), which generated haystacks lack")
    _close_gates(answerer.model, settings)
    longest = max(settings.frames)
    log.info("encoding  %s frames", f"{longest:,}")
    haystack = Haystack(answerer, longest, settings.haystack, settings.seed, settings.scratch)
    try:
        for place, data in stored.items():
            cell = Cell.from_json(data) if data else _measure(settings, answerer, haystack, *place)
            if not data:
                folder.write(_file(*place), cell.to_json())
            log.info("%s", cell)
            yield cell
    finally:
        haystack.close()


def _file(frames: int, depth: float, hops: int) -> str:
    return f"cell-{frames}-{depth:g}-{hops}.json"


def _close_gates(model: torch.nn.Module, settings: NeedleSettings) -> None:
    """Turn cross-attentions off: behind a gate of zero they add nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for branch in ("v2v", "t2v"):
                if not getattr(settings, branch) and name.endswith(f".{branch}.gate"):
                    parameter.zero_()


def _measure(
    settings: NeedleSettings, answerer: Answerer, haystack: Haystack, frames: int, depth: float, hops: int
) -> Cell:
    """Ask all questions of a cell."""
    answers: list[ScoredAnswer] = []
    memory = PeakMemory(answerer.device)
    began = time.perf_counter()
    for number in range(settings.videos):
        rng = np.random.default_rng([settings.seed, number, hops])
        colours = colours_of(number, hops, settings.seed)
        places = places_of(frames, depth, hops)
        with_needles = [needles.insert(haystack.frame(i), c, rng) for i, c in zip(places, colours, strict=True)]
        features = haystack.encode(np.stack(with_needles)).float()
        text, expected = needles.question(colours)
        content = [{"type": "video"}, {"type": "text", "text": text}]
        spliced = haystack.with_frames(frames, dict(zip(places, features, strict=True)))
        try:
            answer = stream_answer(
                answerer.model, answerer.processor, [{"role": "user", "content": content}], spliced, ANSWER_TOKENS,
                settings.chunk_frames,
            )  # fmt: skip
        except ValueError as error:  # it is longer than the decoder's context
            return Cell(frames, depth, hops, [], 0.0, 0, str(error))
        answers.append(ScoredAnswer(text, answer, expected, scoring.is_right(answer, expected)))
    seconds = (time.perf_counter() - began) / settings.videos
    return Cell(frames, depth, hops, answers, round(seconds, 4), memory.bytes(), None)


def colours_of(number: int, hops: int, seed: int) -> list[str]:
    """Return the colours of a question's needles. The questions take all colours in all orders in turn, so with a
    multiple of 4 questions (one hop) or 12 (two), no constant answer is right more often than by chance."""
    orders = list(itertools.permutations(needles.NEEDLES, hops))
    return list(orders[np.random.default_rng([seed, hops]).permutation(len(orders))[number % len(orders)]])


def places_of(frames: int, depth: float, hops: int) -> list[int]:
    """Return the frames of the needles: the first at `depth` [%] of where it can be, the others evenly behind it.

    >>> places_of(101, 50, 1), places_of(100, 0, 2), places_of(100, 100, 2)
    ([50], [0, 99], [98, 99])
    """
    first = round(depth / 100 * (frames - hops))
    return [first + round(i * (frames - 1 - first) / max(1, hops - 1)) for i in range(hops)]


class PeakMemory:
    """The largest memory of this process from here on, on the device that computes.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # resets the high-water mark, where this is allowed
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Return it [bytes]."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _accuracy(cells: list[Cell]) -> Estimate:
    """Return the accuracy of all cells. The same question is asked in each cell, so it is a cluster.

    Raises:
        BadConfig: no cell fits the decoder's context.
    """
    right = [answer.right for cell in cells for answer in cell.answers]
    clusters = [f"{cell.hops} {i}" for cell in cells for i in range(len(cell.answers))]
    if not right:
        raise BadConfig(f"--frames: nothing fits: {cells[0].error}")
    return intervals.accuracy(right, clusters)


def _metrics(cells: list[Cell], estimate: Estimate) -> dict[str, float]:
    metrics = {"accuracy": estimate.value, "accuracy_low": estimate.low, "accuracy_high": estimate.high}
    for cell in cells:
        where = f"hops {cell.hops}/frames {cell.frames}/depth {cell.depth:g}"
        if cell.answers:
            metrics |= {
                f"accuracy/{where}": cell.share,
                f"seconds/{where}": cell.seconds,
                f"memory_gb/{where}": cell.memory_bytes / 1e9,
            }
    return metrics
