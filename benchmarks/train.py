"""A training step under Ray Train compared to a bare loop, and the startup time of a run.

    python -m benchmarks.train --json

(a) `step_over_bare`: step time of a run (`crosslmm.train.run.run_training`: Ray Train, MLflow, watchdog, asynchronous
    checkpoints, everything but the data pipeline) / step time of two plain processes with FSDP and a for loop. Both
    have the same model and the same batches in memory; the benchmark fails unless the losses are equal to the last bit.
    `checkpoint_share`: share of its time that the run waits for checkpoints, with one checkpoint per round.
(b) `startup_s`: from `python jobs/train.py` to the end of its first step; the detail says where the time goes.

Both arms run all the time and take turns of a few seconds, in alternating order; the arm without the turn waits for a
message. A round is as many turns as lie between two checkpoints; the figure is the median of the rounds' ratios. Each
arm has two ranks with one thread each, on two cores. All ranks have the niceness that Ray gives its workers; otherwise
other programs on these cores would slow down one arm only. Ray's own processes (about twenty, idle) run during both
arms' turns, so their cost is not in the figure.
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
from crosslmm.train import worker
from crosslmm.train.checkpoint import seals
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.loop import StepBatch
from crosslmm.train.optim import build_optimizer, set_learning_rate
from crosslmm.train.run import run_training

LIMITS = {"step_over_bare": "<= 1.05"}
RANKS, BATCHES = 2, 4
TURN, ROUND = 10, 70
"""Steps of a turn, and between two checkpoints. A checkpoint starts in the middle of a turn and is sealed before its
end. That is one a minute; the presets save one in 500 steps of seconds each. Turns are short because the speed of the
machine changes from minute to minute."""
NICENESS = 15
"""Niceness of Ray's workers (RAY_worker_niceness)."""
QUESTION, ANSWER = "Which way does it move, and what colour is it?", "right, red"


def configuration(folder: Path, rounds: int) -> RunConfig:
    """Return a run of `rounds` rounds, after one to warm up; a step takes about 0.8 s on two cores."""
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
    """Return the batches that a rank repeats."""
    processor = build_processor(config.model)
    random = np.random.default_rng(rank)
    side, size = processor.image_size, config.train.micro_batch_size
    question = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
    messages: list[dict[str, Any]] = [question, {"role": "assistant", "content": ANSWER}]
    steps = []
    for number in range(BATCHES):
        shape = (config.data.num_frames, side, side, 3)
        videos = [[random.integers(0, 256, shape, dtype=np.uint8)] for _ in range(size)]
        steps.append(StepBatch([processor([messages] * size, videos)], [f"{number}-{i}" for i in range(size)]))
    return steps


class Turns:
    """Steps of one rank. Before each turn it reports the duration of the last one and waits for permission.

    Args:
        address, key: of the process that gives permission.
        arm, rank: of this process.
        steps: batches that are repeated.
        count: number of steps.
    """

    def __init__(self, address: Any, key: bytes, arm: str, rank: int, steps: list[StepBatch], count: int) -> None:
        self.connection: Connection = Client(address, authkey=key)
        self.connection.send((arm, rank))
        self.steps, self.count = steps, count

    def __iter__(self) -> Iterator[StepBatch]:
        began = None
        for number in range(self.count):
            # Half a turn after a checkpoint.
            if number % TURN == TURN // 2:
                self.connection.send((None if began is None else time.perf_counter() - began, time.time()))
                self.connection.recv()
                began = time.perf_counter()
            yield self.steps[number % BATCHES]


def in_ray_train(address: Any, key: bytes) -> Callable[[dict[str, Any]], None]:
    """Return the worker's function, with its batches result from `Turns`."""

    def train(train_loop_config: dict[str, Any]) -> None:
        def repeated_batches(job: Any, *_: Any) -> Iterator[StepBatch]:
            rank = dist.get_rank()
            return iter(Turns(address, key, "ray", rank, batches(job.config, rank), job.total_steps))

        worker._batches = repeated_batches  # type: ignore[assignment]
        worker.train(train_loop_config)  # this process has just imported the module: the original function

    return train


def bare(config: RunConfig, rank: int, port: int, address: Any, key: bytes) -> None:
    """Run the other arm: a bare training loop."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    processor = build_processor(config.model)
    model: Any = parallelize(
        lambda weights: build_model(config.model, processor, config.seed, weights), config.train, torch.device("cpu")
    )
    optimizer = build_optimizer(model, config.train)
    steps = batches(config, rank)
    # All ranks have the same number of labelled tokens.
    labelled = RANKS * int((steps[0].micro[0]["labels"][:, 1:] != -100).sum())
    count = int(config.train.max_steps or 0)
    turns, losses = Turns(address, key, "bare", rank, steps, count), []
    model.train()
    for number, batch in enumerate(turns):
        set_learning_rate(optimizer, number, count, config.train)
        loss = model(**batch.micro[0], num_items_in_batch=1).loss * (RANKS / labelled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach() / RANKS)
    all_losses = torch.stack(losses)
    dist.all_reduce(all_losses)
    turns.connection.send(all_losses.tolist())
    dist.destroy_process_group()


def alternate_turns(listener: Listener, rounds: int, result: dict[str, Any]) -> None:
    """Wait for both arms, then let them take turns; the first round warms up.

    Args:
        listener: ranks connect to it.
        rounds: number of rounds that count.
        result: gets the duration of each round by arm [s], begin and end of Ray's turns, and the bare arm's losses.
    """
    connections: dict[tuple[str, int], Connection] = {}
    while len(connections) < 2 * RANKS:
        connection = listener.accept()
        connections[connection.recv()] = connection
    for connection in connections.values():
        connection.recv()
    result |= {"bare": [0.0] * (rounds + 1), "ray": [0.0] * (rounds + 1), "turns": []}
    for turn in range((rounds + 1) * ROUND // TURN):
        for arm in ("bare", "ray") if turn % 2 else ("ray", "bare"):
            ranks, began = [connections[arm, rank] for rank in range(RANKS)], time.time()
            for connection in ranks:
                connection.send("go")
            result[arm][turn * TURN // ROUND] += max(connection.recv()[0] for connection in ranks)
            if arm == "ray":
                result["turns"].append((began, time.time()))
    for arm in ("bare", "ray"):
        del result[arm][0]
    for connection in connections.values():  # the last step of the run
        connection.send("go")
    result["losses"] = connections["bare", 0].recv()


def steps(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure point (a)."""
    write_sample_set(str(folder / "sample"), train=8, held_out=4)
    config = configuration(folder, rounds)
    key, result = secrets.token_bytes(16), dict[str, Any]()
    spawn = multiprocessing.get_context("spawn")
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        alternation = threading.Thread(target=alternate_turns, args=(listener, rounds, result), daemon=True)
        alternation.start()
        port = _free_port()
        bare_ranks = [spawn.Process(target=bare, args=(config, r, port, listener.address, key)) for r in range(RANKS)]
        for process in bare_ranks:
            process.start()
        worker.train = in_ray_train(listener.address, key)  # type: ignore[assignment]
        training = run_training(config)
        alternation.join()
        for process in bare_ranks:
            process.join()
    history = [
        json.loads(line) for path in sorted((folder / "steps" / "history").glob("*.jsonl")) for line in path.open()
    ]
    history.sort(key=lambda line: line["step"])
    assert [line["metrics"]["loss"] for line in history] == result["losses"], "the arms' losses differ"
    checkpoints = seals.list_sealed(str(folder / "steps"))
    for checkpoint in checkpoints[1:]:  # without the newest, which ends the run
        assert any(a < checkpoint.sealed_at < b for a, b in result["turns"]), "a checkpoint was written out of turn"
    ratios = [a / b for a, b in zip(result["ray"], result["bare"], strict=True)]
    figures = {
        "step_over_bare": statistics.median(ratios),
        "step_s": statistics.median(result["ray"]) / ROUND,
        "bare_step_s": statistics.median(result["bare"]) / ROUND,
        "checkpoint_share": _saving_s(history) / sum(b - a for a, b in result["turns"]),
    }
    detail = {key: result[key] for key in ("ray", "bare")} | {"ratios": ratios, "checkpoint_bytes": checkpoints[0].size}
    return figures, detail | {"steps": training.steps}


def _saving_s(history: list[dict[str, Any]]) -> float:
    """Return the time that the run waited for checkpoints [s]: `checkpoint_share` also counts the other arm's turns."""
    last = history[-1]
    return last["metrics"]["checkpoint_share"] * (last["time"] - history[0]["time"] + history[0]["metrics"]["step_s"])


def _free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measure the requested points and print each figure beside its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of point a (default: 3)")
    parser.add_argument("--starts", type=int, default=2, help="starts of point b (default: 2)")
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
            measured, detail["steps"] = steps(folder, arguments.rounds)
            figures |= measured
    table = Table("figure", "measured", "limit", title="training")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:.3f}", LIMITS.get(figure, ""))
    for part, seconds in middle["parts"].items() if "b" in arguments.points else ():
        table.add_row(f"  {part} [s]", f"{seconds:.1f}", "")
    report("train", table, figures, detail, arguments.json)


if __name__ == "__main__":
    main()
