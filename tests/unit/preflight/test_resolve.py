"""A configuration is made complete before it leaves the directory in which it was given."""

from crosslmm.cli import parse_run
from crosslmm.preflight.resolve import resolve_config


def test_local_weights_are_found_from_the_workers_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "decoder.gguf").touch()
    (tmp_path / "tiny").mkdir()  # not what the tokenizer `tiny` means
    config = parse_run(
        ["--config=tiny", "--model.vision_weights=encoder", "--model.language_weights=decoder.gguf",
         "--model.init_from=models:/crosslmm@champion"], "",
    )  # fmt: skip
    model = resolve_config(config).model
    assert (model.vision_weights, model.language_weights) == (f"{tmp_path}/encoder", f"{tmp_path}/decoder.gguf")
    assert (model.tokenizer, model.init_from) == ("tiny", "models:/crosslmm@champion")
    hub = config.model_copy(update={"model": config.model.model_copy(update={"vision_weights": "google/siglip"})})
    assert resolve_config(hub).model.vision_weights == "google/siglip"
