"""A training step under Ray Train against a bare loop, and the seconds until the first one.

    python -m benchmarks.train --json

(a) `step_over_bare`: step time of a whole run, `crosslmm.train.run.run`: Ray Train, record in MLflow, watchdog,
    asynchronous checkpoints, everything but the data pipeline / of two plain processes with torch's FSDP and a for
    loop. The same model and the same batches, which lie in memory in both; the losses are equal to the bit, or it
    fails. `checkpoint_share`: of its time the run spent on waiting for checkpoints, one in every round.
(b) `startup_s`: from `python jobs/train.py` to the end of its first step; where the seconds go is in the detail.

Both arms are there all the time and take turns of a few seconds, the order turning; who has no turn waits for a
message. A round is as many turns as lie between two checkpoints, and the figure is the median of the rounds' ratios.
Two ranks and one thread for each, on two cores. All ranks have the niceness that Ray gives its workers: what else runs
on these cores would take its time from one arm alone. What Ray's own processes do all the time (about twenty, idle)
they do in both arms' turns, so it is not in the figure.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks import report, startup
from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train import checkpoint_store, worker
from crosslmm.train.loop import StepBatch
from crosslmm.train.optim import build_optimizer, set_learning_rate
from crosslmm.train.parallel import parallelize
from crosslmm.train.run import run_training

LIMITS = {"step_over_bare": "<= 1.05"}
RANKS, BATCHES = 2, 4
TURN, ROUND = 10, 70
"""Steps in a turn, and between checkpoints: one is begun in the middle of a turn, and sealed before its end. That is
one a minute; the presets take one in 500 steps of seconds each. A turn is short because the machine's pace changes from
one minute to the next."""
NICENESS = 15
"""Of Ray's workers (RAY_worker_niceness)."""
QUESTION, ANSWER = "Which way does it move, and what colour is it?", "right, red"


def configuration(folder: Path, rounds: int) -> RunConfig:
    """A run of so many rounds, after one to warm up; a step takes about 0.8 s on two cores."""
    settings = {
        "model.vision": "{hidden_size: 128, intermediate_size: 384, num_hidden_layers: 3, num_attention_heads: 4, "
        "image_size: 112, patch_size: 8}",
        "model.language": "{model_type: qwen2, vocab_size: 512, hidden_size: 256, intermediate_size: 1024, "
        "num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: true}",
        "model.pool_stride": "7",
        "data.manifest": str(folder / "sample" / "train.jsonl"),
        "data.num_frames": "8",
        "train.global_batch_size": str(2 * RANKS),
        "train.micro_batch_size": "2",
        "train.epochs": "1000",
        "train.max_steps": str((rounds + 1) * ROUND + TURN // 2 + 1),
        "train.validate_every": "100000",
        "train.checkpoint_every": str(ROUND),
        "train.keep_checkpoints": "1000",
        "scaling.num_workers": str(RANKS),
        "storage": str(folder),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "name": "steps",
    }
    return parse_run(["--config=tiny", *(f"--{key}={value}" for key, value in settings.items())], "")


def batches(config: RunConfig, rank: int) -> list[StepBatch]:
    """What a rank trains on, over and over."""
    processor = build_processor(config.model)
    random = np.random.default_rng(rank)
    side, size = processor.image_size, config.train.micro_batch_size
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
    talk: list[dict[str, Any]] = [asked, {"role": "assistant", "content": ANSWER}]
    steps = []
    for number in range(BATCHES):
        shape = (config.data.num_frames, side, side, 3)
        videos = [[random.integers(0, 256, shape, dtype=np.uint8)] for _ in range(size)]
        steps.append(StepBatch([processor([talk] * size, videos)], [f"{number}-{i}" for i in range(size)]))
    return steps


class Turns:
    """One rank's steps; before the first of each turn it says how long the last turn took, and waits for the next.

    Args:
        address, key: of the process that deals out turns.
        arm, rank: who it is.
        steps: what comes, over and over.
        count: steps in all.
    """

    def __init__(self, address: Any, key: bytes, arm: str, rank: int, steps: list[StepBatch], count: int) -> None:
        self.line: Connection = Client(address, authkey=key)
        self.line.send((arm, rank))
        self.steps, self.count = steps, count

    def __iter__(self) -> Iterator[StepBatch]:
        began = None
        for number in range(self.count):
            # Half a turn after a checkpoint.
            if number % TURN == TURN // 2:
                self.line.send((None if began is None else time.perf_counter() - began, time.time()))
                self.line.recv()
                began = time.perf_counter()
            yield self.steps[number % BATCHES]


def in_ray_train(address: Any, key: bytes) -> Callable[[dict[str, Any]], None]:
    """What a worker does, but for where its batches come from."""

    def train(train_loop_config: dict[str, Any]) -> None:
        def held(job: Any, *_: Any) -> Iterator[StepBatch]:
            rank = dist.get_rank()
            return iter(Turns(address, key, "ray", rank, batches(job.config, rank), job.total_steps))

        worker._batches = held  # type: ignore[assignment]
        worker.train(train_loop_config)  # here, in a process that has just imported it, still the whole one

    return train


def bare(config: RunConfig, rank: int, port: int, address: Any, key: bytes) -> None:
    """The other arm: what a training loop cannot do without."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    processor = build_processor(config.model)
    model: Any = parallelize(
        lambda weights: build_model(config.model, processor, config.seed, weights), config.train, torch.device("cpu")
    )
    optimizer = build_optimizer(model, config.train)
    held = batches(config, rank)
    # All ranks have as many labelled tokens.
    labelled = RANKS * int((held[0].micro[0]["labels"][:, 1:] != -100).sum())
    count = int(config.train.max_steps or 0)
    turns, losses = Turns(address, key, "bare", rank, held, count), []
    model.train()
    for number, step in enumerate(turns):
        set_learning_rate(optimizer, number, count, config.train)
        loss = model(**step.micro[0], num_items_in_batch=1).loss * (RANKS / labelled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach() / RANKS)
    everyone = torch.stack(losses)
    dist.all_reduce(everyone)
    turns.line.send(everyone.tolist())
    dist.destroy_process_group()


def deal_turns(listener: Listener, rounds: int, taken: dict[str, Any]) -> None:
    """Wait for both arms, then let one after the other take its turn; the first round warms up.

    Args:
        listener: to which the ranks come.
        rounds: to count.
        taken: gets the seconds of each round, by arm, when each turn was, and the bare arm's losses.
    """
    lines: dict[tuple[str, int], Connection] = {}
    while len(lines) < 2 * RANKS:
        line = listener.accept()
        lines[line.recv()] = line
    for line in lines.values():
        line.recv()
    taken |= {"bare": [0.0] * (rounds + 1), "ray": [0.0] * (rounds + 1), "turns": []}
    for turn in range((rounds + 1) * ROUND // TURN):
        for arm in ("bare", "ray") if turn % 2 else ("ray", "bare"):
            ranks, began = [lines[arm, rank] for rank in range(RANKS)], time.time()
            for line in ranks:
                line.send("go")
            taken[arm][turn * TURN // ROUND] += max(line.recv()[0] for line in ranks)
            if arm == "ray":
                taken["turns"].append((began, time.time()))
    for arm in ("bare", "ray"):
        del taken[arm][0]
    for line in lines.values():  # the step that ends the run
        line.send("go")
    taken["losses"] = lines["bare", 0].recv()


def steps(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Point (a)."""
    write_sample_set(str(folder / "sample"), train=8, held_out=4)
    config = configuration(folder, rounds)
    key, taken = secrets.token_bytes(16), dict[str, Any]()
    spawn = multiprocessing.get_context("spawn")
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        dealer = threading.Thread(target=deal_turns, args=(listener, rounds, taken), daemon=True)
        dealer.start()
        port = _free_port()
        others = [spawn.Process(target=bare, args=(config, r, port, listener.address, key)) for r in range(RANKS)]
        for process in others:
            process.start()
        worker.train = in_ray_train(listener.address, key)  # type: ignore[assignment]
        outcome = run_training(config)
        dealer.join()
        for process in others:
            process.join()
    history = [
        json.loads(line) for path in sorted((folder / "steps" / "history").glob("*.jsonl")) for line in path.open()
    ]
    history.sort(key=lambda line: line["step"])
    assert [line["metrics"]["loss"] for line in history] == taken["losses"], "the arms' losses differ"
    for found in checkpoint_store.list_sealed(str(folder / "steps"))[1:]:  # but for the one that ends the run
        assert any(a < found.sealed_at < b for a, b in taken["turns"]), "a checkpoint was written out of turn"
    ratios = [a / b for a, b in zip(taken["ray"], taken["bare"], strict=True)]
    figures = {
        "step_over_bare": statistics.median(ratios),
        "step_s": statistics.median(taken["ray"]) / ROUND,
        "bare_step_s": statistics.median(taken["bare"]) / ROUND,
        "checkpoint_share": _saving_s(history) / sum(b - a for a, b in taken["turns"]),
    }
    checkpoint_bytes = checkpoint_store.list_sealed(str(folder / "steps"))[0].size
    detail = {key: taken[key] for key in ("ray", "bare")} | {"ratios": ratios, "checkpoint_bytes": checkpoint_bytes}
    return figures, detail | {"steps": outcome.steps}


def _saving_s(history: list[dict[str, Any]]) -> float:
    """What the run's own `checkpoint_share` says in seconds; the turns of the other arm are in its denominator."""
    last = history[-1]
    return last["metrics"]["checkpoint_share"] * (last["time"] - history[0]["time"] + history[0]["metrics"]["step_s"])


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> None:
    """Measure the points asked for and print each figure beside its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--points", default="ba", help="which of a and b (default: both)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "b" in arguments.points:
            starts = sorted((startup.start(folder) for _ in range(arguments.starts)), key=lambda s: s["startup_s"])
            detail["starts"] = starts
            middle = starts[len(starts) // 2]
            figures |= {"startup_s": middle["startup_s"], "startup_cpu_s": sum(middle["cpu_s"].values())}
            print(json.dumps(middle), file=sys.stderr, flush=True)
        if "a" in arguments.points:
            found, detail["steps"] = steps(folder, arguments.rounds)
            figures |= found
    table = Table("figure", "measured", "limit", title="training")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:.3f}", LIMITS.get(figure, ""))
    for part, seconds in middle["parts"].items() if "b" in arguments.points else ():
        table.add_row(f"  {part} [s]", f"{seconds:.1f}", "")
    report("train", table, figures, detail, arguments.json)


if __name__ == "__main__":
    main()
