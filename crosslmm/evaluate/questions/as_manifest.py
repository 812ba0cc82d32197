"""Writes the questions of a benchmark as a manifest, for validation in training and for sweeps."""

import json

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.evaluate.questions.source import Source


def write_manifest(source: Source, uri: str) -> int:
    """Write questions and expected answers as a manifest; return the number of rows.

    Questions that cannot be asked are left out. Validation compares by exact match: the answer is the option's letter.

    Args:
        source: the questions.
        uri: path or s3:// URI of the manifest, which must end with .jsonl.

    Raises:
        BadConfig: the prompts depend on the times of frames, or `uri` has another ending.
    """
    if any(question.subtitles for question in source.questions):
        raise BadConfig(f"--write_manifest: which subtitles {source.benchmark.name} shows depends on the frames")
    if not uri.endswith(".jsonl"):
        raise BadConfig(f"--write_manifest {uri}: the name of a manifest ends with .jsonl")
    rows = [
        {
            "id": question.id,
            "video": question.videos[0],
            "messages": [*question.messages, {"role": "assistant", "content": question.answer}],
            **({"kind": question.groups[0][1]} if question.groups else {}),
        }
        for question in source.questions
        if question.error is None
    ]
    storage.write_bytes(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return len(rows)
