"""The rendered files of cluster/ match their templates and facts, and one another."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, meta

from cluster import render
from crosslmm.cli import parse_run
from crosslmm.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"

RENDERED = render.render()
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
JOBS = ["rayjob-train", "rayjob-tune"]


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def clusters() -> Iterator[Any]:
    """Yield the specifications of all Ray clusters in Kubernetes."""
    yield documents("kuberay/raycluster.yaml")[0]["spec"]
    for job in JOBS:
        yield documents(f"kuberay/{job}.yaml")[0]["spec"]["rayClusterSpec"]


def of_kind(name: str, kind: str) -> Any:
    return next(one for one in documents(name) if one["kind"] == kind)


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_committed_files_match_their_templates(path: Path) -> None:
    assert path.read_text() == RENDERED[path], "python cluster/render.py"


def test_every_fact_is_used() -> None:
    parse = Environment().parse
    named = [meta.find_undeclared_variables(parse(p.read_text())) for p in render.TEMPLATES.rglob("*") if p.is_file()]
    assert render.facts().keys() <= set().union(*named)


def test_versions_match_the_project() -> None:
    images = set(re.findall(r"image: *(\S*crosslmm\S*)", "".join(RENDERED.values())))
    tags = {image.partition("@")[0].rpartition(":")[2] for image in images}
    assert tags == {f"{PROJECT['version']}-{kind}" for kind in ("cpu", "gpu")}
    assert {cluster["rayVersion"] for cluster in clusters()} == {PINS["ray"]}
    for name in ("Dockerfile", "Dockerfile.cpu"):
        (python,) = set(re.findall(r"(?:python:|--python )(3[.\d]+)", (CLUSTER / name).read_text()))
        assert f">={'.'.join(python.split('.')[:2])}" == PROJECT["requires-python"]
    assert f"flash-attn=={PINS['flash-attn']}" in (CLUSTER / "Dockerfile").read_text()


def test_node_groups_are_equal_on_aws_and_kubernetes() -> None:
    aws = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    types = aws["available_node_types"]
    for cluster in clusters():
        head, workers = cluster["headGroupSpec"], {one["groupName"]: one for one in cluster["workerGroupSpecs"]}
        assert types.keys() == {"head", *workers}
        assert head["rayStartParams"]["num-cpus"] == str(types["head"]["resources"]["CPU"]) == "0"
        assert types["head"]["labels"] == head["labels"]
        for name, group in workers.items():
            assert types[name]["labels"] == group["labels"]
            assert types[name]["max_workers"] == group["maxReplicas"]
            pod = group["template"]["spec"]
            assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == types[name]["node_config"]["InstanceType"]
            requests = pod["containers"][0]["resources"]["requests"]
            assert int(requests.get("nvidia.com/gpu", 0)) == types[name]["resources"].get("GPU", 0)
    assert aws["max_workers"] == sum(types[name]["max_workers"] for name in workers)


def test_only_drivers_are_on_demand_and_all_others_on_spot() -> None:
    types = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"]
    assert {name for name, one in types.items() if "InstanceMarketOptions" not in one["node_config"]} == {"head"}
    for cluster in clusters():
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        capacity = [one["template"]["spec"]["nodeSelector"]["eks.amazonaws.com/capacityType"] for one in groups]
        assert capacity == ["ON_DEMAND", "SPOT", "SPOT"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_not_retried_and_ends_at_a_deadline(name: str) -> None:
    (job,) = documents(f"kuberay/{name}.yaml")
    spec = job["spec"]
    assert spec["backoffLimit"] == 0  # Ray's job retries inside; KubeRay cannot tell a refused request from a lost head
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"] <= 7 * 24 * 3600
    # The job ends by itself before, with a checkpoint: two hours are for images, nodes, and the last step.
    (hours,) = re.findall(r"--hours (\d+)", spec["entrypoint"])
    assert 0 < int(hours) * 3600 <= spec["activeDeadlineSeconds"] - 2 * 3600
    assert spec["shutdownAfterJobFinishes"]
    assert 8 * 3600 <= spec["ttlSecondsAfterFinished"] <= 24 * 3600  # a night
    assert " --name " in spec["entrypoint"]
    # A driver that reserves resources may be placed on any node that has them.
    assert not [key for key in spec if key.startswith("entrypoint") and key != "entrypoint"]


def test_nothing_refuses_the_drain_of_a_node_for_ever() -> None:
    """A budget that a single pod cannot meet does; autoscalers are asked to choose another node instead."""
    for path in sorted(CLUSTER.rglob("*.yaml")):
        if "templates" not in path.parts and not path.name.startswith("compose"):
            assert "kind: PodDisruptionBudget" not in path.read_text(), path
    for cluster in clusters():
        annotations = cluster["headGroupSpec"]["template"]["metadata"]["annotations"]
        assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        assert annotations["karpenter.sh/do-not-disrupt"] == "true"


def test_every_image_is_named_by_digest() -> None:
    """A node that has the image of a tag would run old code under it."""
    named = re.findall(r"^\s*(?:-\s*)?(?:image|worker_image): *(\S+)", "\n".join(RENDERED.values()), re.MULTILINE)
    assert len(named) > 10
    assert not [image for image in named if "@sha256:" not in image]


def test_a_stopped_job_has_time_for_its_checkpoint() -> None:
    (wait,) = set(re.findall(r"RAY_JOB_STOP_WAIT_TIME_S\D+(\d+)", "".join(RENDERED.values())))
    from crosslmm.train.launcher import STOP_TIMEOUT_S

    assert int(wait) > STOP_TIMEOUT_S


def configuration(name: str) -> RunConfig:
    """Return the configuration of a RayJob's entrypoint, run in the repository's root."""
    entrypoint = documents(f"kuberay/{name}.yaml")[0]["spec"]["entrypoint"].split()
    script, arguments = entrypoint[1], entrypoint[2:]
    assert (ROOT / script).is_file()
    own_options = {"--space", "--trials", "--hours"}
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return parse_run([part for pair in pairs if pair[0] not in own_options for part in pair], "")


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_configuration_is_valid_and_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = configuration(name)
    facts = render.facts()
    assert config.storage == f"s3://{facts['bucket']}/runs"
    train, decode = facts["groups"]["train"], facts["groups"]["decode"]
    # The groups, scaled to their limits, have room for it, with one core of each node left to Kubernetes.
    assert config.scaling.most_workers <= train["gpus"] * train["most"]
    assert config.scaling.cpus_per_worker * train["gpus"] <= train["cpus"] - 1
    decoders = 2 * config.scaling.decode_workers * config.scaling.cpus_per_decode_worker
    assert decoders <= (decode["cpus"] - 1) * decode["most"]


def test_the_mlflow_server_has_one_command_line() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]
    (container,) = of_kind("mlflow/kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == compose["command"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables.keys() == compose["environment"].keys()
    for name, value in variables.items():
        # A secret is a reference: to a Secret in Kubernetes, to the environment without a default in compose.
        assert compose["environment"][name] in (value, *([] if value else [compose_secret(compose, name)]))
    gc = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]["gc"]
    cron = of_kind("mlflow/kubernetes.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert cron["containers"][0]["command"] == gc["command"]
    assert {one["name"] for one in cron["containers"][0]["env"]} == gc["environment"].keys()
    ini = of_kind("mlflow/kubernetes.yaml", "ConfigMap")["data"]["basic_auth.ini"]
    assert ini == (CLUSTER / "mlflow" / "basic_auth.ini").read_text()


def compose_secret(compose: Any, name: str) -> str:
    value = str(compose["environment"][name])
    assert value.startswith(f"${{{name}:?")
    return value


def test_the_mlflow_server_accepts_the_names_that_clusters_use() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]
    allowed = compose["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    called = set(re.findall(r"http://([\w.]+:\d+)", RENDERED[CLUSTER / "aws.yaml"]))
    for cluster in clusters():
        (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        (uri,) = (one["value"] for one in container["env"] if one["name"] == "MLFLOW_TRACKING_URI")
        called.add(uri.removeprefix("http://"))
    assert called <= set(allowed)
    assert len(called) == 2
    assert not [host for host in allowed if "*" in host]


@pytest.mark.parametrize("name", JOBS)
def test_node_types_match_the_clusters_and_have_room_for_a_job(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    from crosslmm.preflight.placement import NodePool, check_driver, check_resources

    monkeypatch.chdir(ROOT)
    config = configuration(name)
    types = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"]
    check_driver(config, types["head"]["labels"])
    # The autoscaler has not added any node yet.
    head = NodePool(1, types["head"]["resources"], types["head"]["labels"])
    node_types = [NodePool(one.most, one.resources, one.labels) for one in config.scaling.node_types]
    check_resources(config, [head, *node_types])
    # AWS and Kubernetes both have the node types of the configuration.
    for nodes in node_types:
        (node_type,) = [one for one in types.values() if one["labels"] == nodes.labels]
        assert node_type["max_workers"] == nodes.count
        room = dict(nodes.resources)
        objects, memory = room.pop("object_store_memory"), room.pop("memory")
        assert all(node_type["resources"][kind] >= count for kind, count in room.items())
        for cluster in clusters():
            (group,) = [one for one in cluster["workerGroupSpecs"] if one["labels"] == nodes.labels]
            assert group["maxReplicas"] == nodes.count
            requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
            assert {"CPU": int(requests["cpu"]), "GPU": int(requests.get("nvidia.com/gpu", 0))} == {"GPU": 0} | room
            # Ray's default share of a pod's memory; of a whole machine's memory it is more.
            gib = int(requests["memory"].removesuffix("Gi"))
            assert objects == int(DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * gib * 2**30)
            assert objects + memory <= gib * 2**30
