"""The rendered files satisfy the schemas of Ray, KubeRay and Kubernetes, and misspelt ones do not."""

import contextlib
import copy
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = Path(__file__).parent / "kuberay"
SHARED_SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay"))
KUBERNETES = "1.34"
"""The oldest supported version: later ones accept what it accepts."""

MANIFESTS = [f"kuberay/{name}.yaml" for name in ("common", "raycluster", "rayjob-train", "rayjob-tune")]
MANIFESTS.append("mlflow/kubernetes.yaml")


def documents(name: str) -> list[Any]:
    return [one for one in yaml.safe_load_all((CLUSTER / name).read_text()) if one]


def closed(schema: Any) -> Any:
    """Return the schema with unknown keys refused; the API server would drop them silently."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


def crd(kind: str) -> Any:
    return json.loads(gzip.decompress((SCHEMAS / f"{kind.lower()}.v1.schema.json.gz").read_bytes()))


def pods(document: Any) -> Iterator[Any]:
    """Yield every pod template of a KubeRay document, as a pod."""
    spec = document["spec"]
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]


def check_kubernetes(document: Any) -> None:
    """Raise jsonschema.ValidationError if the document violates its schema."""
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    schema = closed(crd(document["kind"]))
    # A CRD's schema only declares metadata as an object.
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator(schema).validate(document)
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}, KUBERNETES, strict=True
    )
    for template in pods(document):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True)


def check_aws(config: Any) -> None:
    """Validate as `ray up` does before it calls the cloud."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepared = prepare_config(config)
    validate_config(prepared)


def test_ray_up_accepts_the_cluster() -> None:
    check_aws(yaml.safe_load((CLUSTER / "aws.yaml").read_text()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minute",), 5),
        (("provider", "use_internal_ips"), "yes"),
        (("head_node_type",), "heads"),
        (("auth", "ssh_proxy_comand"), "x"),
        (("docker", "run_option"), []),
        (("available_node_types", "decode", "label"), {}),
        (("available_node_types", "decode", "labels"), {"crosslmm.io/role": 1}),
        (("available_node_types", "train", "resources"), {"GPU": "4"}),
        (("available_node_types", "train", "docker", "image"), "x"),
        (("available_node_types", "train", "min_workers"), 99),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_ray_up_refuses_misspelt_keys(path: tuple[str, ...], value: Any) -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    put(config, path, value)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_aws(config)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_accepts_the_manifests(name: str) -> None:
    for document in documents(name):
        check_kubernetes(document)


HEAD = ("spec", "headGroupSpec", "template", "spec")


@pytest.mark.parametrize(
    ("name", "kind", "path", "value"),
    [
        ("raycluster", "RayCluster", ("spec", "authOption"), {"mode": "token"}),
        ("raycluster", "RayCluster", ("spec", "authOptions", "mode"), "tokens"),
        ("raycluster", "RayCluster", ("spec", "autoscalerOptions", "version"), "v3"),
        ("raycluster", "RayCluster", ("spec", "headGroupSpec", "label"), {}),
        ("raycluster", "RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplica"), 2),
        ("raycluster", "RayCluster", ("spec", "workerGroupSpecs", 1, "rayStartParams", "num-cpus"), 3),
        ("raycluster", "RayCluster", (*HEAD, "serviceAccount_name"), "x"),
        ("raycluster", "RayCluster", (*HEAD, "containers", 0, "readynessProbe"), {}),
        ("raycluster", "RayCluster", (*HEAD, "containers", 0, "livenessProbe", "httpGet", "port"), None),
        ("raycluster", "RayCluster", (*HEAD, "containers", 0, "env", 0, "value"), 60),
        ("raycluster", "RayCluster", ("metadata", "label"), {}),
        ("rayjob-train", "RayJob", ("spec", "activeDeadlineSecond"), 1),
        ("rayjob-train", "RayJob", ("spec", "preRunningDeadlineSeconds"), "1h"),
        ("rayjob-train", "RayJob", ("spec", "backofLimit"), 3),
        ("rayjob-train", "RayJob", ("spec", "backoffLimit"), "3"),
        ("rayjob-train", "RayJob", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 0),
        ("rayjob-tune", "RayJob", ("spec", "submitterPodTemplate", "spec", "restartpolicy"), "Never"),
        ("common", "NetworkPolicy", ("spec", "egress", 0, "too"), []),
        ("../mlflow/kubernetes", "Deployment", ("spec", "template", "spec", "containers", 0, "commands"), []),
        ("../mlflow/kubernetes", "StatefulSet", ("spec", "serviceNames"), "x"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_kubernetes_refuses_misspelt_keys(name: str, kind: str, path: tuple[str, ...], value: Any) -> None:
    document = next(one for one in documents(f"kuberay/{name}.yaml") if one["kind"] == kind)
    check_kubernetes(document)
    broken = copy.deepcopy(document)
    put(broken, path, value)
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(broken)


def put(document: Any, path: tuple[str | int, ...], value: Any) -> None:
    *parents, key = path
    for one in parents:
        document = document[one]
    document[key] = value


@pytest.mark.skipif(not SHARED_SCHEMAS.is_dir(), reason="only this checkout's copy of the schemas is available")
@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_the_schemas_equal_the_shared_copies(kind: str) -> None:
    name = f"{kind}.v1.schema.json.gz"
    assert (SCHEMAS / name).read_bytes() == (SHARED_SCHEMAS / name).read_bytes()
