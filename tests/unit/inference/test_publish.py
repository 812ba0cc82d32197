"""The model card, and what is taken out of a configuration that is published."""

import pytest
import yaml

from crosslmm.config import to_yaml, validate_run
from crosslmm.inference.publish import is_hub_target, licence_of, model_card, without_addresses
from crosslmm.model.loading import build_config

SECRET = "secret-bucket"


@pytest.fixture
def run(config):
    data = {
        "manifest": {f"s3://{SECRET}/a.jsonl": 2, f"/home/{SECRET}/b|b.jsonl": 1},
        "validation_manifest": f"s3://{SECRET}/held-out.jsonl",
        "roots": [f"s3://{SECRET}/videos"],
    }
    model = {
        "vision_weights": "google/siglip2-so400m-patch14-384",
        "language_weights": f"/data/{SECRET}/Qwen2.5-1.5B",
        "init_from": f"s3://{SECRET}/runs/stage-1/model",
    }
    return config.model_copy(
        update={
            "name": "first-try",
            "storage": f"s3://{SECRET}/runs",
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update=model),
            "tracking": config.tracking.model_copy(update={"uri": f"http://{SECRET}:5000"}),
        }
    )


def test_a_card_has_data_scores_licences_and_configuration(config, run):
    datasets = [{"uri": f"s3://{SECRET}/a|.jsonl\n# x", "digest": "ab12", "rows": 1234, "context": "training"}]
    card = model_card(run, build_config(config.model), 1_000_000, datasets, 1500, {"validation/accuracy": 0.876543})
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["crosslmm", "video"],
        "base_model": ["google/siglip2-so400m-patch14-384"],
    }
    assert "# first-try" in text
    assert "1,000,000 parameters, after 1,500 training steps" in text
    assert r"| a\|.jsonl\n# x | 1,234 | ab12 | training |" in text
    assert "| accuracy | 0.8765 |" in text
    assert "| vision | google/siglip2-so400m-patch14-384 | apache-2.0 |" in text
    assert "| language | Qwen2.5-1.5B | not known here: look it up before you publish |" in text
    assert "pool_stride: 3" in text
    assert SECRET not in card


def test_a_published_configuration_has_no_addresses_and_still_loads(run):
    published = to_yaml(without_addresses(run))
    assert SECRET not in published
    loaded = validate_run(yaml.safe_load(published))
    assert loaded.data.manifest == {"a.jsonl": 2, "b|b.jsonl": 1}
    assert loaded.model.vision_weights == "google/siglip2-so400m-patch14-384"
    assert loaded.train == run.train


def test_licences_of_base_models():
    assert licence_of("Qwen/Qwen2.5-7B-Instruct") == "apache-2.0"
    assert licence_of("Qwen/Qwen2.5-3B-Instruct") == "qwen-research"
    assert "look it up" in licence_of("someone/else")


def test_targets_of_a_push(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "folder").mkdir(parents=True)
    hub = {
        "owner/name": True,
        "my/folder": False,
        "s3://bucket/name": False,
        "/a/b": False,
        "name": False,
        "a/b/c": False,
    }
    assert {target: is_hub_target(target) for target in hub} == hub
