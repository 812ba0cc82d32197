"""Access control in the files of cluster/: who may reach Ray, MLflow and the database, and with which permissions."""

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import render

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"

AWS = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
NODES = [one["node_config"] for one in AWS["available_node_types"].values()]
FACTS = render.facts()
RENDERED = render.render()
FILES = [path for path in RENDERED if path.suffix == ".yaml"]
MANIFESTS = [
    document
    for path in FILES
    if path.parent.name == "kuberay" or path.name == "kubernetes.yaml"
    for document in yaml.safe_load_all(path.read_text())
    if document
]


def values_of(document: Any, key: str) -> Iterator[Any]:
    """Yield all values of a key, at any depth."""
    if isinstance(document, dict):
        yield from (value for name, value in document.items() if name == key)
    for inner in document.values() if isinstance(document, dict) else document if isinstance(document, list) else []:
        yield from values_of(inner, key)


def of_kind(kind: str) -> list[Any]:
    return [one for one in MANIFESTS if one["kind"] == kind]


def clusters() -> list[Any]:
    """Specifications of all Ray clusters."""
    return [one["spec"].get("rayClusterSpec", one["spec"]) for one in of_kind("RayCluster") + of_kind("RayJob")]


def templates() -> list[Any]:
    """All pod templates."""
    found = [one for document in MANIFESTS for one in values_of(document, "template") if "containers" in one["spec"]]
    return found + [one for document in MANIFESTS for one in values_of(document, "submitterPodTemplate")]


def pods(role: str) -> list[Any]:
    """Specifications of the pods of head, train or decode, in all clusters."""
    return [one["spec"] for one in templates() if one["metadata"]["labels"].get(FACTS["role_label"]) == role]


def test_every_ray_cluster_requires_the_token() -> None:
    assert "--env RAY_AUTH_MODE=token" in AWS["docker"]["run_options"]
    assert len(clusters()) == 3
    assert {cluster["authOptions"]["mode"] for cluster in clusters()} == {"token"}


def test_no_dashboard_or_server_is_reachable_from_outside() -> None:
    (head,) = [line for line in AWS["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    # ClusterIP is the default of services, also of KubeRay's service of the head.
    assert not [kind for one in MANIFESTS for kind in values_of(one, "serviceType")]
    services = of_kind("Service")
    assert {one["metadata"]["name"] for one in services} == {"mlflow", "postgres"}
    assert {one["spec"].get("type", "ClusterIP") for one in services} == {"ClusterIP"}
    assert not [one for one in MANIFESTS if one["kind"] in ("Ingress", "HTTPRoute", "Gateway")]
    for key in ("hostNetwork", "hostPort", "hostPath", "externalIPs"):
        assert not [one for document in MANIFESTS for one in values_of(document, key)], key


SUBMITTER, OPERATOR = {FACTS["role_label"]: "submitter"}, {"app.kubernetes.io/name": "kuberay-operator"}
PODS = {
    **{role: {FACTS["role_label"]: role, "ray.io/is-ray-node": "yes"} for role in ("head", "train", "decode")},
    "submitter": SUBMITTER,
    **{app: {"app": app} for app in ("mlflow", "mlflow-gc", "postgres")},
    "another": {"app": "another"},
    "operator": OPERATOR | {"namespace": FACTS["kuberay_namespace"]},
    "impostor": OPERATOR | {"namespace": "elsewhere"},
    "elsewhere": {"app": "mlflow", "namespace": "elsewhere"},
    "dns": {"k8s-app": "kube-dns", "namespace": "kube-system"},
}
"""Labels of pods, with their namespace where it is another one."""
S3, KUBERNETES_API, HUB, METADATA = "10.0.64.9", "10.0.65.9", "18.0.0.1", "169.254.169.254"
NAMED_PORTS = {"http": FACTS["mlflow_port"], "postgres": 5432}
DASHBOARD, GCS = FACTS["dashboard_port"], FACTS["gcs_port"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in expressions
    )


def is_peer(peer: dict[str, Any], place: str) -> bool:
    """Whether a pod of PODS, or an address, is one that a rule names."""
    if block := peer.get("ipBlock"):
        inside = [place not in PODS and ipaddress.ip_address(place) in ipaddress.ip_network(block["cidr"])]
        return all(inside) and not any(
            ipaddress.ip_address(place) in ipaddress.ip_network(one) for one in block.get("except", [])
        )
    if place not in PODS:
        return False
    namespace = PODS[place].get("namespace", FACTS["kubernetes_namespace"])
    own = {"matchLabels": {"kubernetes.io/metadata.name": FACTS["kubernetes_namespace"]}}
    inside = selects(peer.get("namespaceSelector", own), {"kubernetes.io/metadata.name": namespace})
    return inside and selects(peer.get("podSelector", {}), PODS[place])


def allows(direction: str, pod: str, place: str, port: int) -> bool:
    """Whether the policies of a pod let it send to, or receive from, a place."""
    if "namespace" in PODS[pod]:
        return True
    policies = [one["spec"] for one in of_kind("NetworkPolicy")]
    policies = [one for one in policies if selects(one["podSelector"], PODS[pod]) and direction in one["policyTypes"]]
    rules = [rule for one in policies for rule in one.get(direction.lower(), [])]
    key = {"Ingress": "from", "Egress": "to"}[direction]
    fitting = [rule for rule in rules if key not in rule or any(is_peer(peer, place) for peer in rule[key])]
    numbers = [[NAMED_PORTS.get(one["port"], one["port"]) for one in rule.get("ports", [])] for rule in fitting]
    return not policies or any(not some or port in some for some in numbers)


def reaches(source: str, target: str, port: int) -> bool:
    """Whether a pod may connect to another, or to an address."""
    sent = source not in PODS or allows("Egress", source, target, port)
    return sent and (target not in PODS or allows("Ingress", target, source, port))


def test_network_policies_cover_every_pod() -> None:
    added_by_kuberay = {"ray.io/is-ray-node": "yes"}
    for template in templates():
        labels = template["metadata"]["labels"]
        assert [pod for pod in PODS.values() if pod.items() <= (labels | added_by_kuberay).items()], labels
    assert all(one["metadata"]["namespace"] == FACTS["kubernetes_namespace"] for one in of_kind("NetworkPolicy"))


@pytest.mark.parametrize("pod", [pod for pod in PODS if "namespace" not in PODS[pod]])
def test_every_pod_may_ask_for_names_and_is_refused_everything_that_no_policy_names(pod: str) -> None:
    assert reaches(pod, "dns", 53)
    for target in ("another", "elsewhere", HUB, METADATA, S3):
        assert not reaches(pod, target, 80)
    assert not reaches(pod, METADATA, 443)
    for source in ("another", "elsewhere", HUB, "impostor"):
        assert not any(reaches(source, pod, port) for port in (80, DASHBOARD, GCS, 5000, 5432, 52365))


@pytest.mark.parametrize(
    ("pod", "places"),
    [
        ("head", {(S3, 443), (KUBERNETES_API, 443), (HUB, 443), ("mlflow", 5000)}),
        ("train", {(S3, 443), (HUB, 443)}),
        ("decode", {(S3, 443)}),
        ("submitter", {("head", DASHBOARD)}),
        ("mlflow", {(S3, 443), ("postgres", 5432)}),
        ("mlflow-gc", {("mlflow", 5000), ("postgres", 5432)}),
        ("postgres", set()),
        ("another", set()),
    ],
)
def test_each_pod_reaches_what_it_needs_and_nothing_else(pod: str, places: set[tuple[str, int]]) -> None:
    targets = [S3, KUBERNETES_API, HUB, "mlflow", "postgres", "submitter", *(["head"] if pod == "submitter" else [])]
    ports = (80, 443, 5000, 5432, DASHBOARD, GCS)
    assert {(target, port) for target in targets for port in ports if reaches(pod, target, port)} == places


def test_ray_is_reached_by_its_own_nodes_and_its_dashboard_by_submitters_and_the_operator() -> None:
    nodes = ("head", "train", "decode")
    assert all(reaches(one, other, port) for one in nodes for other in nodes for port in (GCS, DASHBOARD, 20000))
    for one in ("submitter", "operator"):
        assert reaches(one, "head", DASHBOARD)
        assert not reaches(one, "head", GCS)
    assert not any(reaches(one, "head", DASHBOARD) for one in ("mlflow", "mlflow-gc", "postgres", "impostor"))


def test_aws_nodes_are_private() -> None:
    assert AWS["provider"]["use_internal_ips"] is True
    for role, one in AWS["available_node_types"].items():
        node = one["node_config"]
        assert node["SubnetIds"] == FACTS["subnets"]
        assert node["SecurityGroupIds"] == [FACTS["security_groups"]["all"], FACTS["security_groups"][role]]
        assert not {"NetworkInterfaces", "AssociatePublicIpAddress"} & node.keys()
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] is True for disk in node["BlockDeviceMappings"])
    # ssh goes through Session Manager: no open port, no security group that Ray would open one in, no shared key pair
    # (`ray up` creates one for its user).
    assert not [key for key in ("ssh_private_key", "ssh_public_key") if key in AWS["auth"]]
    assert "ssm start-session" in AWS["auth"]["ssh_proxy_command"]
    assert "security_group" not in AWS["provider"]
    assert not [node for node in NODES if "KeyName" in node]


def grants(role: str, action: str, place: str) -> bool:
    """Whether a policy of iam/ allows an action on an object or the bucket."""
    policy = json.loads((CLUSTER / "iam" / f"{role}.json").read_text())
    assert (policy["Version"], {one["Effect"] for one in policy["Statement"]}) == ("2012-10-17", {"Allow"})

    def fits(patterns: str | list[str], value: str) -> bool:
        return any(fnmatchcase(value, one) for one in ([patterns] if isinstance(patterns, str) else patterns))

    return any(fits(one["Action"], action) and fits(one["Resource"], place) for one in policy["Statement"])


FOLDERS = ("data", "runs", "runs/features", "mlflow", "")
WRITES = ("s3:PutObject", "s3:DeleteObject", "s3:PutBucketPolicy", "s3:PutObjectAcl")


@pytest.mark.parametrize(
    ("role", "reads", "writes"),
    [
        ("head", {"data", "runs", "runs/features"}, {"runs", "runs/features"}),
        ("train", {"data", "runs", "runs/features"}, {"runs", "runs/features"}),
        ("decode", {"data", "runs/features"}, set()),
        ("mlflow", {"mlflow"}, {"mlflow"}),
        ("head-ec2", set(), set()),
    ],
)
def test_roles_read_and_write_what_their_nodes_do(role: str, reads: set[str], writes: set[str]) -> None:
    bucket = f"arn:aws:s3:::{FACTS['bucket']}"
    objects = {folder: f"{bucket}/{folder}/x.mp4".replace("//", "/") for folder in FOLDERS}
    assert {folder for folder, one in objects.items() if grants(role, "s3:GetObject", one)} == reads
    assert {folder for folder, one in objects.items() for do in WRITES if grants(role, do, one)} == writes
    # Not of another bucket, nor of the bucket itself.
    for action in (*WRITES, "s3:GetObject"):
        assert not grants(role, action, "arn:aws:s3:::another/data/x.mp4")
        assert not grants(role, action, bucket)
        assert not grants(role, action, f"{bucket}-2/data/x.mp4")


def test_nobody_writes_the_data_and_no_role_is_a_wildcard() -> None:
    policies = [path for path in RENDERED if path.parent.name == "iam"]
    assert {path.stem for path in policies} == {"head", "head-ec2", "train", "decode", "mlflow"}
    for path in policies:
        for one in json.loads(RENDERED[path])["Statement"]:
            actions = [one["Action"]] if isinstance(one["Action"], str) else one["Action"]
            assert not [action for action in actions if action in ("*", "s3:*", "ec2:*", "iam:*")]
            assert not {"NotAction", "NotResource"} & one.keys()
        for action in WRITES:
            assert not grants(path.stem, action, f"arn:aws:s3:::{FACTS['bucket']}/data/train.jsonl")
    # The head cannot give a node its own role, which starts machines.
    account = f"arn:aws:iam::{FACTS['account']}:role"
    assert grants("head-ec2", "iam:PassRole", f"{account}/crosslmm-decode")
    assert not grants("head-ec2", "iam:PassRole", f"{account}/crosslmm-head")


def test_a_folder_is_listed_only_by_who_reads_it() -> None:
    for role in ("head", "train", "decode", "mlflow"):
        policy = json.loads((CLUSTER / "iam" / f"{role}.json").read_text())["Statement"]
        (names,) = [one for one in policy if one["Action"] == "s3:ListBucket"]
        listed = names["Condition"]["StringLikeIfExists"]["s3:prefix"]
        for prefix in listed:
            assert grants(role, "s3:GetObject", f"arn:aws:s3:::{FACTS['bucket']}/{prefix.removesuffix('/*')}/x")


@pytest.mark.parametrize("role", ["head", "train", "decode"])
def test_each_kind_of_node_has_its_own_role(role: str) -> None:
    node = AWS["available_node_types"][role]["node_config"]
    assert node["IamInstanceProfile"] == {"Name": f"crosslmm-{role}"}
    (account,) = [one for one in of_kind("ServiceAccount") if one["metadata"]["name"] == f"crosslmm-{role}"]
    arn = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    assert arn == f"arn:aws:iam::{FACTS['account']}:role/crosslmm-{role}"
    assert account["automountServiceAccountToken"] is (role == "head")
    assert len(pods(role)) == 3
    assert {pod["serviceAccountName"] for pod in pods(role)} == {f"crosslmm-{role}"}


def test_only_heads_have_the_login_to_mlflow() -> None:
    for role in ("train", "decode"):
        environment = [one["name"] for pod in pods(role) for one in pod["containers"][0]["env"]]
        assert environment
        assert not [name for name in environment if "MLFLOW" in name]
        assert not [pod for pod in pods(role) if "mlflow" in json.dumps(pod)]
    assert [one["name"] for one in pods("head")[0]["containers"][0]["env"] if "PASSWORD" in one["name"]]
    # Ray copies file mounts to every node.
    assert list(AWS["file_mounts"]) == ["~/.ray"]
    everywhere = {key: value for key, value in AWS.items() if key not in ("docker", "head_setup_commands")}
    everywhere |= {key: value for key, value in AWS["docker"].items() if key != "head_run_options"}
    assert "mlflow" not in json.dumps(everywhere).lower()
    assert "MLFLOW_TRACKING_URI" in json.dumps(AWS["docker"]["head_run_options"])


def test_permissions_come_from_roles_and_no_file_has_secrets() -> None:
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"AKIA|ASIA|AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY", text), path
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|USERNAME")
    named = [
        one for document in MANIFESTS for env in values_of(document, "env") for one in env if secret.search(one["name"])
    ]
    assert len(named) > 8
    assert all("value" not in one and "secretKeyRef" in one["valueFrom"] for one in named)
    compose = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]
    values = [
        v for one in compose.values() for name, v in one["environment"].items() if re.search("PASSWORD|SECRET", name)
    ]
    assert len(values) == 6
    assert all(re.fullmatch(r"\$\{\w+:\?.+\}", value) for value in values)


SAFE_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def unrestricted(pod: Any) -> list[str]:
    """What keeps a pod from the Pod Security Standard `restricted`."""
    context, containers = pod.get("securityContext", {}), pod["containers"] + pod.get("initContainers", [])
    faults = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    faults += [one["name"] for one in pod.get("volumes", []) if not SAFE_VOLUMES & one.keys()]
    faults += ["root"] * (context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0)
    faults += ["seccomp"] * (context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"))
    for container in containers:
        own = container.get("securityContext", {})
        faults += ["escalation"] * (own.get("allowPrivilegeEscalation") is not False or bool(own.get("privileged")))
        faults += ["capabilities"] * (own.get("capabilities") != {"drop": ["ALL"]})
        faults += ["root"] * (own.get("runAsNonRoot", True) is not True or own.get("runAsUser") == 0)
        faults += ["ports"] * any("hostPort" in port for port in container.get("ports", []))
        faults += ["seccomp"] * (own.get("seccompProfile", {"type": "RuntimeDefault"})["type"] == "Unconfined")
    return faults


def test_the_namespace_takes_restricted_pods_only() -> None:
    (namespace,) = of_kind("Namespace")
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    # KubeRay's autoscaler has a context of its own; its wait for the head takes the worker's.
    for cluster in clusters():
        autoscaler = {"name": "autoscaler", "securityContext": cluster["autoscalerOptions"]["securityContext"]}
        for pod in (one["template"]["spec"] for one in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]):
            assert unrestricted(pod | {"containers": [*pod["containers"], autoscaler]}) == []
    assert unrestricted({"containers": [{"name": "a"}]}) == ["root", "seccomp", "escalation", "capabilities"]


def test_no_pod_has_unneeded_privileges() -> None:
    assert len(templates()) == 14
    # A pod's setting overrides its account's; the default of both is true.
    mounts = {
        one["metadata"]["name"]: one.get("automountServiceAccountToken", True) for one in of_kind("ServiceAccount")
    }
    for pod in (one["spec"] for one in templates()):
        assert unrestricted(pod) == []
        # Only the head, which scales its cluster, calls the Kubernetes API.
        account = pod.get("serviceAccountName", "default")
        mounted = pod.get("automountServiceAccountToken", mounts.get(account, True))
        assert mounted is (account == "crosslmm-head")


def test_the_mlflow_server_requires_users_and_its_own_names() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]
    assert compose["command"][2:4] == ["--app-name", "basic-auth"]
    assert "*" not in compose["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    # The server runs no users' jobs.
    assert compose["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert "default_permission = READ" in (CLUSTER / "mlflow" / "basic_auth.ini").read_text()


REFERENCE = re.compile(
    r"^\s*(?:- )?(?:image|worker_image|head_image): *(\S+)|^FROM (\S+)|^COPY --from=(\S+)", re.MULTILINE
)


def references(text: str) -> list[str]:
    """Images that a file names, but for stages of a Dockerfile."""
    stages = re.findall(r"^FROM .* AS (\w+)", text, re.MULTILINE)
    return [name for found in REFERENCE.findall(text) for name in found if name and name not in stages]


def test_images_are_named_by_digest() -> None:
    named = [(path, image) for path, text in RENDERED.items() for image in references(text)]
    assert len(named) > 20
    assert [(path, image) for path, image in named if not re.fullmatch(r"[^@]+:[^@]+@sha256:[0-9a-f]{64}", image)] == []
    # `render.py --pin` asks for all of them.
    assert {image.partition("@")[0] for _, image in named} == render.images(RENDERED).keys()
    # No template names one in another way.
    for path in render.TEMPLATES.rglob("*"):
        assert not path.is_file() or not re.search(
            r"(?:image: |^FROM |--from=)(?!build\b|\{\{ pinned)", path.read_text(), re.M
        )


def test_pinning_writes_what_the_registries_answer(tmp_path: Path) -> None:
    """With a program in place of Docker's, which knows all images but this project's own."""
    for name in ("cluster", "constraints.txt", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(
        "#!/bin/sh\n"
        'test "$*" = "buildx imagetools inspect --format {{.Manifest.Digest}} $6" || exit 2\n'
        'case "$6" in *crosslmm*) echo "ERROR: $6: not found" >&2; exit 1;; esac\n'
        'echo "sha256:$(printf %s "$6" | sha256sum | cut -c1-64)"\n'
    )
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{docker.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "cluster/render.py", "--pin"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    pinned = yaml.safe_load((tmp_path / "cluster/digests.yaml").read_text())
    own = {image for image in render.images(RENDERED) if "crosslmm" in image}
    assert pinned.keys() == render.images(RENDERED).keys() - own
    for path in RENDERED:
        text = (tmp_path / "cluster" / path.relative_to(CLUSTER)).read_text()
        for image in references(text):
            name, _, digest = image.partition("@")
            assert digest == pinned.get(name, render.UNKNOWN_DIGEST)
    assert [image for image in own if f"{image}: ERROR: {image}: not found" not in done.stderr] == []
    last = done.stderr.splitlines()[-1]
    assert last.startswith("no machine can pull these before")
    assert not [image for image in pinned if image in last]


@pytest.mark.parametrize("asked", ["no", "yes"])
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_install_everything_but_decord_unless_asked(name: str, asked: str, tmp_path: Path) -> None:
    text = (CLUSTER / name).read_text().replace("\\\n", "")
    assert "\nARG DECORD=no\n" in text
    (choose,) = re.findall(r"^RUN (\{ .*DECORD.*\}) +&& pip install", text, re.MULTILINE)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["sh", "-c", choose], cwd=tmp_path, env=os.environ | {"DECORD": asked}, check=True)
    before, after = (tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (ROOT, tmp_path))
    left_out = [one for one in before["project"]["dependencies"] if one not in after["project"]["dependencies"]]
    assert [one.partition(">")[0] for one in left_out] == ([] if asked == "yes" else ["decord"])
    after["project"]["dependencies"] = before["project"]["dependencies"]
    assert after == before
