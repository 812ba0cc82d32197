"""What is published: the model card of an exported folder, and its upload to the hub."""

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crosslmm.config import BadConfig, ModelConfig, RunConfig, to_yaml, validate_run
from crosslmm.run_folder import MODEL_CONFIG_FILE
from crosslmm.text import in_brief, one_printable_line

CARD_FILE = "README.md"
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)

LICENCES = {
    "google/siglip": "apache-2.0",
    "HuggingFaceTB/SmolLM2": "apache-2.0",
    "Qwen/Qwen2.5": "apache-2.0",
    "Qwen/Qwen2.5-3B": "qwen-research",
    "Qwen/Qwen2.5-72B": "qwen",
}
"""Licences of published weights whose hub name begins so; the longest beginning counts."""
UNKNOWN = "not known here: look it up before you publish"

CARD = """\
---
{metadata}---

# {name}

A [CrossLMM](https://arxiv.org/abs/2505.17020) of {parameters} parameters, after {step} training steps. A frame takes
{tokens_per_frame} tokens of the language model's context. Training used at most {num_frames} frames of a video
(`sampling: {sampling}`).

```
pip install crosslmm
```

```python
import crosslmm
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER OR NAME")
processor = AutoProcessor.from_pretrained("FOLDER OR NAME")
question = [{{"type": "video", "video": "clip.mp4"}}, {{"type": "text", "text": "What happens?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, tokenize=True, return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

## Data

{data}

## Scores

{scores}

## Base models and their licences

{bases}

## Configuration

`run.yaml` beside this file has all of it.

```yaml
{configuration}```
"""


def model_card(
    config: RunConfig,
    model_config: Any,
    parameters: int,
    datasets: Sequence[Mapping[str, Any]],
    step: int,
    metrics: Mapping[str, float],
) -> str:
    """Return the model card of an exported model, as Markdown. It names files of data, and no addresses.

    Args:
        config: the run.
        model_config: `CrossLMMConfig` of the model.
        parameters: of the model.
        datasets: `datasets` of the run's run.json.
        step: training steps.
        metrics: of the last validation.
    """
    bases = {key: getattr(config.model, key) for key in ("vision_weights", "language_weights", "init_from")}
    published = {key: name for key, name in bases.items() if name and _is_hub_name(name)}
    metadata = {"library_name": "transformers", "pipeline_tag": "video-text-to-text", "tags": ["crosslmm", "video"]}
    if published:
        metadata["base_model"] = sorted(published.values())
    settings = without_addresses(config).model_dump(include={"model": True, "train": True, "seed": True})
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=one_printable_line(str(config.name)),
        parameters=f"{parameters:,}",
        step=f"{step:,}",
        tokens_per_frame=model_config.tokens_per_frame,
        num_frames=config.data.num_frames,
        sampling=config.data.sampling,
        data=_table(
            ("manifest", "rows", "sha256", "used for"),
            [(_last_part(d["uri"]), f"{d['rows']:,}", d["digest"], d["context"]) for d in datasets],
        ),
        scores=_table(
            ("validation", "value"), [(k.removeprefix("validation/"), f"{v:.4g}") for k, v in metrics.items()]
        ),
        bases=_table(
            ("part", "weights", "licence"),
            [(key.removesuffix("_weights"), _last_part(name), licence_of(name)) for key, name in bases.items() if name],
        ),
        configuration=yaml.safe_dump(settings, sort_keys=False),
    )


def licence_of(name: str) -> str:
    """Return the licence of published weights, as far as it is known."""
    known = [beginning for beginning in LICENCES if name.startswith(beginning)]
    return LICENCES[max(known, key=len)] if known else UNKNOWN


def without_addresses(config: RunConfig) -> RunConfig:
    """Return a configuration to publish: of data, weights and storage it keeps the last part of each address."""
    data, model = config.data, config.model
    manifests = data.manifest if isinstance(data.manifest, dict) else None
    data = data.model_copy(
        update={
            "manifest": {_last_part(uri): share for uri, share in manifests.items()}
            if manifests
            else _last_part(str(data.manifest)),
            "validation_manifest": data.validation_manifest and _last_part(data.validation_manifest),
            "features": data.features and _last_part(data.features),
            "roots": [],
        }
    )
    weights = {key: getattr(model, key) for key in ModelConfig.model_fields if key.endswith("_weights")}
    weights |= {"init_from": model.init_from, "tokenizer": model.tokenizer}
    model = model.model_copy(update={key: value and _last_part(value) for key, value in weights.items()})
    tracking = config.tracking.model_copy(update={"uri": None, "artifacts": None})
    return config.model_copy(update={"data": data, "model": model, "tracking": tracking, "storage": "runs"})


def push(folder: Path, name: str, private: bool) -> str:
    """Upload an exported folder to a repository on the hub; return its address. A missing repository is created.

    Args:
        folder: of an exported model; its `run.yaml` is uploaded without addresses.
        name: owner/name on the hub. The token is that of `hf auth login` or HF_TOKEN.
        private: whether only the owner can see a new repository; an existing one stays as it is.

    Raises:
        BadConfig: the hub refuses the name or the token.
        OSError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    run = folder / MODEL_CONFIG_FILE
    run.write_text(to_yaml(without_addresses(validate_run(yaml.safe_load(run.read_text())))))
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of an exported model"))
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        raise BadConfig(f"{name}: the hub refuses it: {in_brief(error)}{remedy}") from error
    except HTTPError as error:  # of the HTTP library, when no answer came
        endpoint = os.environ.get("HF_ENDPOINT", "the hub")
        raise OSError(f"{name}: {endpoint} does not answer: {in_brief(error)}") from error


def is_hub_target(target: str) -> bool:
    """Return whether a push goes to the hub: owner/name, which is not a folder of this machine."""
    return bool(HUB_NAME.fullmatch(target)) and not Path(target).exists()


def _is_hub_name(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(".gguf")


def _last_part(address: str) -> str:
    """Return a hub name as it is; of a path or URI the last part."""
    return address if _is_hub_name(address) else posixpath.basename(address.rstrip("/"))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "None."
    cells = [[one_printable_line(str(cell)).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])
