"""Untrusted input and credentials, as docs/security.md describes them."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.tracking import MlflowClient

from crosslmm import storage
from crosslmm.cli import fail, parse_run
from crosslmm.config import BadConfig, DataConfig, TrackingConfig
from crosslmm.data import dataset, manifest_shards
from crosslmm.data.dataset import BlockLayout, ReadSamples, unpack_block
from crosslmm.data.manifest import BadManifest, Manifest, Rows
from crosslmm.data.row_schema import parse_rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode import VideoFailure, decode_video
from crosslmm.model.loading import build_model
from crosslmm.run_folder import begin_run
from crosslmm.text import redacted
from crosslmm.tracking import BackgroundSync, MlflowRun, require_answer
from tests.support.common import ROOT, conversation

SIDE = 32
SECRET = "s3cr3t/with+slash"


def row(name, video):
    return {"id": name, "video": video, "messages": conversation("What?", name)}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ESCAPES = [
    "/etc/passwd",
    "../secret.mp4",
    "../secret.mp4#t=0,1",
    "clips/../../secret.mp4",
    "../data-2/secret.mp4",  # a folder whose name only begins like ours
    "file:///etc/passwd",
    "file://~/secret.mp4",
    "file://host/secret.mp4",
    "s3://elsewhere/secret.mp4",
    "http://169.254.169.254/latest/meta-data",
    "https://host/clip.mp4",
    "concat://a|b",
    "file:///a::s3://b",
    "s3://key:secret@bucket/clip.mp4",
]


@pytest.mark.parametrize("video", ESCAPES)
def test_row_with_a_video_outside_the_roots_is_malformed(tmp_path, video):
    inside = row("a", "clips/a.mp4#t=1,2")
    for part in ({"video": video}, {"messages": conversation_of({"type": "image", "image": video})}):
        outside = {key: value for key, value in row("b", None).items() if value is not None} | part
        manifest = write(tmp_path / "data/rows.jsonl", inside, outside)
        with pytest.raises(BadManifest, match=r"rows\.jsonl: line 2: .*(only local paths|credentials|--data\.roots)"):
            Manifest(manifest)


def conversation_of(part):
    return [{"role": "user", "content": [part]}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("video", ["%2e%2e/a.mp4", "file:/etc/passwd", "concat:a|/etc/passwd", "..a.mp4", "a..b/c.mp4"])
def test_odd_file_names_are_not_decoded(tmp_path, video):
    manifest = Manifest(write(tmp_path / "rows.jsonl", row("a", video)))
    assert manifest.rows[0]["videos"] == [f"{tmp_path}/{video}"]
    found = decode_video(f"{tmp_path}/{video}", DataConfig(roots=manifest.roots), SIDE)
    assert found == VideoFailure("no such file", "read")


def test_a_root_lets_its_own_in_and_no_other(tmp_path):
    manifest = write(tmp_path / "rows.jsonl", row("a", "/videos/a.mp4"), row("b", "s3://bucket/clips/b.mp4"))
    assert len(Manifest(manifest, ["/videos/", "s3://bucket/clips"])) == 2
    for roots in (["/videos", "s3://bucket/clip"], ["/video", "s3://bucket"], ["/videos/a", "s3://bucket/clips"]):
        with pytest.raises(BadManifest, match="lies outside"):
            Manifest(manifest, roots)


@pytest.mark.parametrize(
    ("uri", "roots", "inside"),
    [
        ("s3://bucket/data/a.mp4", ["s3://bucket/data"], True),
        ("s3://bucket/data/a.mp4", ["s3://bucket"], True),
        ("s3://bucket/data-2/a.mp4", ["s3://bucket/data"], False),
        ("s3://bucket-2/a.mp4", ["s3://bucket"], False),
        ("s3://bucket/data/../secret", ["s3://bucket/data"], False),
        ("s3://bucket/data/..", ["s3://bucket"], False),
        ("s3://bucket/data/%2e%2e/secret", ["s3://bucket/data"], True),  # a key of that name
        ("/bucket/data/a.mp4", ["s3://bucket/data"], False),
        ("s3://bucket/a.mp4", ["/"], False),
        ("/a/b", ["/"], True),
        ("/a/b/../c", ["/a"], True),
        ("/a/b", ["/a/b"], False),
        ("file:///a/b", ["/a"], True),
        ("/a/b", ["file:///a"], True),
        ("/a/b", [], False),
    ],
)
def test_within_compares_whole_path_parts(uri, roots, inside):
    assert storage.within(uri, roots) is inside


@pytest.fixture
def foreign(tmp_path):
    """A prepared manifest whose third row nobody here has checked."""
    rows = [
        {"id": f"{i}", "videos": [video], "messages": json.dumps(conversation("?", "!")), "kind": None, "line": i + 1,
         "chars": 2, "seconds": [1.0]}
        for i, video in enumerate(["a.mp4", "b.mp4", "/etc/passwd"])
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, manifest_shards.SCHEMA)
    folder = str(tmp_path / "prepared")
    manifest_shards.seal(folder, [manifest_shards.write_part(folder, 0, table)], table, {})
    return folder


def test_prepared_rows_are_checked_when_read(foreign):
    manifest = Manifest(foreign)
    assert [row["id"] for row in manifest.take([0, 1])] == ["0", "1"]
    says = rf"{foreign}: (line|row) 3: '/etc/passwd' lies outside of {foreign}; add its folder to --data\.roots"
    with pytest.raises(BadManifest, match=says):
        manifest.take([2])
    with pytest.raises(BadManifest, match=says):
        Rows([manifest]).videos()
    assert Manifest(foreign, ["/etc"]).take([2])[0]["videos"] == ["/etc/passwd"]


def test_run_ends_at_a_row_outside_the_roots(foreign, monkeypatch):
    monkeypatch.setattr(dataset.ray, "get", lambda rows: rows)
    reader = ReadSamples(
        BlockLayout(DeterministicSampler((3,), 3, None), 1, 0, 1, 3), Rows([Manifest(foreign)]), DataConfig(), SIDE
    )
    try:
        with pytest.raises(BadManifest, match="line 3: '/etc/passwd' lies outside"):
            list(unpack_block(reader({"block": np.array([0])})))
    finally:
        reader.decoder.__exit__(None, None, None)


def test_links_out_of_the_roots_are_not_followed(tmp_path, monkeypatch):
    secret, data = tmp_path / "secret", tmp_path / "data"
    for folder in (secret, data):
        folder.mkdir()
        (folder / "clip.mp4").write_bytes(encode_clip(np.full((2, 48, 64, 3), 90, np.uint8)))
    (data / "file.mp4").symlink_to(secret / "clip.mp4")
    (data / "folder").symlink_to(secret)
    (data / "here.mp4").symlink_to("clip.mp4")
    (tmp_path / "way").symlink_to(data)
    names = ["clip.mp4", "here.mp4", "file.mp4", "folder/clip.mp4", "folder/../clip.mp4"]

    def seen(manifest, roots=()):
        """As a run's reader does it."""
        monkeypatch.setattr(dataset.ray, "get", lambda rows: rows)
        layout = BlockLayout(DeterministicSampler((len(names),), len(names), None), 1, 0, 1, len(names))
        reader = ReadSamples(layout, Rows([Manifest(manifest, roots)]), DataConfig(num_frames=2), SIDE)
        try:
            return [sample.error for sample in unpack_block(reader({"block": np.array([0])}))]
        finally:
            reader.decoder.__exit__(None, None, None)

    write(data / "rows.jsonl", *(row(name, name) for name in names))
    says = "a link leads outside of the manifest's folder; add its target to --data.roots"
    # The last one is opened as it is named, and not as `..` of where the link leads to, where there is no video.
    (tmp_path / "clip.mp4").write_bytes(b"another")
    assert seen(str(data / "rows.jsonl")) == [None, None, says, says, None]
    assert seen(str(tmp_path / "way/rows.jsonl")) == [None, None, says, says, None]
    assert seen(str(data / "rows.jsonl"), [str(secret)]) == [None] * 5


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", ".metadata"])
def test_pickled_weights_are_refused(config, processor, tmp_path, name):
    mark, folder = tmp_path / "mark", tmp_path / "weights"
    published = build_model(config.model, processor, seed=7)
    for part, key in ((published.vision_tower, "vision_weights"), (published, "init_from")):
        part.save_pretrained(folder / key)
        (folder / key / "model.safetensors").unlink()
        (folder / key / name).write_bytes(pickle.dumps(Evil(mark)))
        with pytest.raises(BadConfig, match=rf"model\.{key}: .* no file named model\.safetensors"):
            build_model(config.model.model_copy(update={key: str(folder / key)}), processor, seed=0)
    assert not mark.exists()
    pickle.loads((folder / "init_from" / name).read_bytes())
    assert mark.exists()  # the trap was one


UNPICKLING = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list", "set_model_state_dict", "set_state_dict", "broadcast_from_rank0",
}  # fmt: skip
"""Functions of torch.distributed that unpickle what other ranks send, and those of torch that call them."""


def test_no_module_unpickles_what_a_rank_or_a_file_brings():
    for path in (*ROOT.glob("crosslmm/**/*.py"), *ROOT.glob("jobs/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "attr", None), getattr(node, "arg", None), getattr(node, "id", None)}
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            assert not names & UNPICKLING, f"{path}:{getattr(node, 'lineno', 0)}"
            assert "pickle" not in imported, path
            assert not module.startswith("torch.distributed.checkpoint"), path
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert call not in {"torch.load", "pickle.loads", "pickle.load", "np.load"}, f"{path}:{node.lineno}"


def test_torch_weights_are_refused(config, processor, tmp_path):
    published = build_model(config.model, processor, seed=7)
    published.vision_tower.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(published.vision_tower.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadConfig, match=r"model\.vision_weights: .* no file named model\.safetensors"):
        build_model(config.model.model_copy(update={"vision_weights": str(tmp_path)}), processor, seed=0)


SAID = {
    r".*\.from_pretrained": ("trust_remote_code", False),
    r"Auto\w+\.from_config": ("trust_remote_code", False),
    r"torch\.load": ("weights_only", True),
}
"""Loaders, and the argument without which a library's default decides whether foreign code runs."""
NOWHERE = {
    "pickle.load", "pickle.loads", "torch.hub.load", "snapshot_download", "hf_hub_download",
    "transformers.pipeline", "load_dataset", "yaml.load", "yaml.unsafe_load", "joblib.load", "read_pickle",
}  # fmt: skip


def test_every_loader_says_that_foreign_code_does_not_run():
    files = [path for folder in ("crosslmm", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    nodes = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text()))]
    calls = [(path, node) for path, node in nodes if isinstance(node, ast.Call)]
    loaders = []
    for path, call in calls:
        name = ast.unparse(call.func)
        place = f"{path}:{call.lineno}: {name}"
        assert not any(name == one or name.endswith(f".{one}") for one in NOWHERE), place
        for loader, (argument, value) in SAID.items():
            if re.fullmatch(loader, name):
                loaders.append(name)
                given = {one.arg: ast.unparse(one.value) for one in call.keywords}
                assert given.get(argument) == str(value), place
    assert len(loaders) >= 7
    # The guard sees what it is for.
    assert {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "auto_class.from_pretrained"} <= set(loaders)


@pytest.mark.parametrize(
    "argument",
    [
        f"--tracking.uri=http://user:{SECRET}@host:5000",
        "--tracking.uri=http://tok3n-s3cr3t@host:5000",
        f"--tracking.uri=postgresql://user:{SECRET}@host/db",
        f"--storage=s3://key:{SECRET}@bucket/runs",
        f"--data.manifest=s3://key:{SECRET}@bucket/rows.jsonl",
        f'--data.manifest={{"s3://key:{SECRET}@bucket/rows.jsonl": 2, "b.jsonl": 1}}',
        f"--data.validation_manifest=s3://key:{SECRET}@bucket/rows.jsonl",
        f'--data.roots=["s3://bucket", "s3://key:{SECRET}@bucket"]',
        f"--model.vision_weights=s3://key:{SECRET}@bucket/weights",
        f"--model.init_from=s3://key:{SECRET}@bucket/model",
        "--tracking.uri=http://user:5000/s3cr3t@host",
        "--tracking.uri=postgresql://host/db?user=me&password=s3cr3t",
        "--data.manifest=https://host/rows.jsonl?X-Amz-Signature=s3cr3t",
    ],
)
def test_credentials_in_a_configuration_are_refused(argument, capsys):
    key = argument.removeprefix("--").split("=")[0]
    with pytest.raises(BadConfig, match=rf"^{key}: holds credentials, .*MLFLOW_TRACKING_PASSWORD.*AWS_") as raised:
        parse_run([argument], "test")
    with pytest.raises(SystemExit):
        fail(raised.value)
    assert "s3cr3t" not in str(raised.value) + "".join(capsys.readouterr())
    for shows in ("--print_config", "--help"):  # before anything is validated
        with pytest.raises(SystemExit):
            parse_run([argument, shows], "test")
        assert "s3cr3t" not in "".join(capsys.readouterr())


def test_a_presigned_address_in_a_row_is_refused_without_its_signature():
    """The reasons of malformed rows are printed, and stored with a prepared manifest."""
    video = "https://bucket.s3.amazonaws.com/a.mp4?X-Amz-Credential=AKs3cr3t&X-Amz-Signature=s3cr3t"
    for odd in (video, "ftp://user:s3cr3t/x@host/a.mp4"):
        _, ((line, reason),) = parse_rows([(1, row("a", odd))], ["/data"])
        assert line == 1
        assert "only local paths" in reason
        assert "s3cr3t" not in reason
    assert odd.partition("@")[2] in reason


def test_a_place_without_credentials_is_no_matter(tmp_path):
    for uri in (
        "http://host:5000",
        "http://host/a@b",
        "http://host:5000/a%40b",
        "sqlite:////data/a@b.db",
        "s3://bucket/a@b",
        "https://h/a:b@c",
    ):
        assert parse_run([f"--tracking.uri={uri}"], "test").tracking.uri == uri
    with pytest.raises(storage.BadLocation, match="credentials") as raised:
        storage.read_bytes("s3://key:s3cr3t@bucket/x")
    assert "s3cr3t" not in str(raised.value)


def test_a_configuration_file_s_credentials_are_not_in_the_help(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"tracking: {{uri: 'http://user:{SECRET}@host:5000'}}")
    with pytest.raises(SystemExit):
        parse_run([f"--config={tmp_path}/run.yaml", "--help"], "test")
    printed = capsys.readouterr().out
    assert "http://***@host:5000" in printed
    assert "s3cr3t" not in printed


CANARIES = ["s3cr3t/with+slash", "p@s3cr3t", "p:s3cr3t", "p#s3cr3t", "p?s3cr3t", "12/s3cr3t", "p%2Fs3cr3t", "s3cr3t"]


@pytest.mark.parametrize("password", CANARIES)
def test_password_from_the_environment_is_not_shown(password, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{password}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record = MlflowRun(TrackingConfig(), "0" * 32)
    assert record.uri == "http://***@127.0.0.1:9"
    record.client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    for call in (lambda: record.log_values({"x": 1.0}, {}), lambda: require_answer(TrackingConfig())):
        with pytest.raises(Exception, match=r"127|port|URL|host|refuses|answer") as raised:
            call()
        with pytest.raises(SystemExit):
            fail(raised.value)
    assert "s3cr3t" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("password", CANARIES)
def test_no_file_and_no_line_of_a_run_shows_the_tracking_server_s_password(password, tmp_path):
    """In processes of their own, as a person would see it: a run whose server is away, its replay, and a bug."""
    script = """if True:
        import sys
        from crosslmm import run_folder, tracking
        from crosslmm.cli import parse_run, start_job
        start_job("x")
        tracking.quiet_mlflow()
        folder, config = sys.argv[1], parse_run(["--name=x"], "")
        run_folder.begin_run(config, folder, {}, [])
        tracking.BackgroundSync(folder, config.tracking, tracking.SyncTimeouts(start_s=5, end_s=1)).finish("FINISHED")
    """
    uri = f"http://localhost:{password}@127.0.0.1:9"  # a parser may take the user for the host
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "COLUMNS": "500"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 250}
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], **options)
    replay = [sys.executable, "jobs/track.py", "replay", "--storage", str(tmp_path)]
    told = subprocess.run(replay, **options)
    assert json.loads((tmp_path / "x" / "run.json").read_text())["tracking"]["uri"] == "http://127.0.0.1:9"
    assert told.returncode == 1
    assert "127.0.0.1:9" in told.stderr
    for printed in (ran.stdout, ran.stderr, told.stdout, told.stderr):
        assert "s3cr3t" not in printed
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]


def test_credentials_in_a_job_s_own_argument_are_refused():
    uri = f"http://user:{SECRET}@host:5000"
    for job, argument in (("track.py replay --storage x", "--tracking.uri"), ("answer.py --video x", "--tracking.uri")):
        command = [sys.executable, *f"jobs/{job}".split(), f"{argument}={uri}"]
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert refused.stderr.startswith(f"error: {argument}: holds credentials, which belong in the environment")
        assert "s3cr3t" not in refused.stderr + refused.stdout


def test_a_database_s_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://user:p@s3cr3t-canary@127.0.0.1:9/mlflow")
    with pytest.raises(Exception, match="s3cr3t-canary") as raised:
        create_sqlalchemy_engine(os.environ["MLFLOW_TRACKING_URI"]).connect()
    # SQLAlchemy takes what follows the first @ for the host, and names it.
    assert "s3cr3t" not in redacted(str(raised.value))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "http://user:s3cr3t/x@127.0.0.1:9"),
        ("HTTPS_PROXY", "http://user:s3cr3t%2Fx@127.0.0.1:9"),
        ("HTTPS_PROXY", "http://tok3n-s3cr3t-0123@127.0.0.1:9"),
    ],
)
def test_the_store_s_errors_do_not_show_the_password_of_an_endpoint_or_proxy(variable, value, tmp_path, monkeypatch):
    """Such an error is the reason of a row in the run's list of unreadable samples, which MLflow gets too."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(variable, value)
    with storage.retrying(storage.NO_RETRIES), pytest.raises((OSError, ValueError)) as raised:
        storage.read_bytes("s3://bucket/x")
    assert "s3://bucket/x" in str(raised.value)
    assert "s3cr3t" not in str(raised.value)


def test_logs_and_tracebacks_hold_no_credentials_and_obey_nobody(tmp_path):
    script = r"""if True:
        import logging
        from crosslmm.cli import start_job
        start_job("x")
        uri = "http://user:s3cr3t/x@host:5000/path"
        log = logging.getLogger("crosslmm.test")
        log.warning("left out: %s", "a\x1b[31m\n2026-01-01 00:00:00,000 INFO run=x forged")
        try:
            raise OSError(f"no {uri}")
        except OSError:
            log.exception("cannot reach %s", uri)
        raise ValueError(f"a bug in {uri} \x1b]0;title\x07")
    """
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "s3cr3t" not in ran.stdout + ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "cannot reach http://***@host:5000/path" in ran.stdout
    assert "OSError: no http://***@host:5000/path" in ran.stdout
    assert ran.stderr.splitlines()[-1] == r"ValueError: a bug in http://***@host:5000/path \x1b]0;title\x07"
    assert not [line for line in ran.stdout.splitlines() if line.startswith("2026-01-01")]


def test_no_file_of_a_run_holds_credentials(tmp_path, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, f"s3cr3t-{name}")
    config = parse_run(
        [f"--tracking.uri=sqlite:///{tmp_path}/record.db", f"--tracking.artifacts={tmp_path}/artifacts", "--name=x"], ""
    )
    begin_run(config, str(tmp_path / "x"), {}, [])
    run = BackgroundSync(str(tmp_path / "x"), config.tracking)
    run.log([(1, 1e9, {"loss": 1.0})])
    run.finish("FINISHED")
    assert run.delivered
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"record.db", "run.json", "config.yaml"} <= {path.name for path in left}
    assert not [path for path in left if b"s3cr3t" in path.read_bytes()]


def test_every_row_of_the_threat_model_names_tests_that_exist():
    table = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("|")][2:]
    named = [part.strip("` ") for line in table for part in line.split("|")[4].split(",")]
    assert len(named) >= len(table)
    for one in named:
        path, test = one.split("::")
        assert f"def {test}(" in (ROOT / path).read_text(), one
