"""The folder of an evaluation in storage: what was asked, and each block of answers once.

STORAGE/evaluations/NAME/
├── evaluation.json       what is asked of which model; another start must ask the same
├── blocks/NNNNNN.jsonl   replies to the questions of a block, a line each, written when the block is done
├── frames/NNNNNN.jsonl   a strip of the frames of each video of a block, as JPEG
├── answers.jsonl         all judged answers, in the order of the benchmark
├── scores.json           the scores
└── report.html           the page
"""

import base64
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.evaluate.scores.judging import Answer, Reply
from crosslmm.run_folder import EVALUATIONS_FOLDER

EVALUATION_FILE, ANSWERS_FILE, SCORES_FILE, PAGE_FILE = "evaluation.json", "answers.jsonl", "scores.json", "report.html"
BLOCKS, FRAMES = "blocks", "frames"
MAX_BLOCK_BYTES = 64 * 2**20
"""Largest file of a block that is read [bytes]."""


class EvaluationFolder:
    """Reads and writes the folder.

    Args:
        storage_uri: folder of all runs.
        name: of the evaluation.

    Attributes:
        uri: path or URI of the folder.
        name: of the evaluation.
    """

    def __init__(self, storage_uri: str, name: str) -> None:
        self.name = name
        self.uri = storage.join(storage.join(storage.absolute(storage_uri), EVALUATIONS_FOLDER), name)

    def begin(self, identity: dict[str, Any], block_videos: int) -> dict[str, Any]:
        """Begin the evaluation, or resume it; return the content of evaluation.json.

        Args:
            identity: what is asked of which model.
            block_videos: videos of a block, unless the evaluation has begun with another number.

        Raises:
            BadConfig: another evaluation was begun under this name.
        """
        uri = storage.join(self.uri, EVALUATION_FILE)
        if not storage.exists(uri):
            begun = {"identity": identity, "block_videos": block_videos, "key": uuid.uuid4().hex}
            storage.write_bytes(uri, json.dumps(begun, indent=1).encode())
            return begun
        begun = storage.read_json(uri)
        if changed := sorted(key for key in identity if identity[key] != begun["identity"].get(key)):
            before, now = begun["identity"].get(changed[0]), identity[changed[0]]
            raise BadConfig(
                f"--name {self.name}: this evaluation was begun with {changed[0]} {before}, and this is {now}; give "
                "another --name"
            )
        return begun

    def done(self, sizes: Sequence[int]) -> dict[int, list[tuple[int, Reply]]]:
        """Return the replies of each finished block, by its number: (number of the question, reply).

        Args:
            sizes: number of questions of each block; a block with another number of replies is not finished.
        """
        blocks: dict[int, list[tuple[int, Reply]]] = {}
        for name in storage.names_in(storage.join(self.uri, BLOCKS)):
            stem = name.removesuffix(".jsonl")
            if not stem.isdecimal() or int(stem) >= len(sizes):
                continue
            try:
                data = storage.read_at_most(self._file(BLOCKS, int(stem)), MAX_BLOCK_BYTES)
                lines = [storage.parse_json(line) for line in data.splitlines()]
                replies = [(int(line.pop("number")), Reply(**line)) for line in lines]
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # it is asked again
            if len({number for number, _ in replies}) == len(replies) == sizes[int(stem)]:
                blocks[int(stem)] = replies
        return blocks

    def write_block(self, block: int, replies: Sequence[tuple[int, Reply]], strips: dict[str, bytes]) -> None:
        """Write a finished block: its strips of frames first, since the replies mark it as finished."""
        frames = [json.dumps({"video": key, "jpeg": base64.b64encode(jpeg).decode()}) for key, jpeg in strips.items()]
        lines = [json.dumps({"number": number} | asdict(reply)) for number, reply in replies]
        storage.write_bytes(self._file(FRAMES, block), _joined(frames))
        storage.write_bytes(self._file(BLOCKS, block), _joined(lines))

    def strips(self) -> Iterator[dict[str, str]]:
        """Yield, block by block, the strip of frames of each row of `VideoRows`, as base64 of a JPEG."""
        for name in storage.names_in(storage.join(self.uri, FRAMES)):
            try:
                data = storage.read_at_most(storage.safe_join(storage.join(self.uri, FRAMES), name), MAX_BLOCK_BYTES)
                lines = [storage.parse_json(line) for line in data.splitlines()]
                yield {str(line["video"]): str(line["jpeg"]) for line in lines}
            except storage.Unavailable:
                raise
            except (OSError, ValueError, TypeError, KeyError):
                continue  # the page does without

    def write_answers(self, answers: Sequence[Answer]) -> None:
        """Write all judged answers."""
        data = _joined([json.dumps(answer.line(), ensure_ascii=False) for answer in answers])
        storage.write_bytes(storage.join(self.uri, ANSWERS_FILE), data)

    def write(self, name: str, data: bytes) -> str:
        """Write another file of the folder; return its path or URI."""
        uri = storage.join(self.uri, name)
        storage.write_bytes(uri, data)
        return uri

    def read(self, name: str) -> bytes | None:
        """Read another file of the folder; None if there is none."""
        uri = storage.join(self.uri, name)
        return storage.read_bytes(uri) if storage.exists(uri) else None

    def _file(self, folder: str, block: int) -> str:
        return storage.join(storage.join(self.uri, folder), f"{block:06d}.jsonl")


def _joined(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
