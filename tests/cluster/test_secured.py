"""Access control in the files of cluster/: who may reach Ray, MLflow and the database, and with which permissions."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster import render

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"

AWS = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
NODES = [one["node_config"] for one in AWS["available_node_types"].values()]
FILES = [path for path in render.render() if path.suffix == ".yaml"]
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


def test_every_ray_cluster_requires_the_token() -> None:
    assert "--env RAY_AUTH_MODE=token" in AWS["docker"]["run_options"]
    clusters = [one["spec"] for one in of_kind("RayCluster")]
    clusters += [one["spec"]["rayClusterSpec"] for one in of_kind("RayJob")]
    assert len(clusters) == 3
    assert {cluster["authOptions"]["mode"] for cluster in clusters} == {"token"}


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


def test_network_policies_cover_every_pod() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("NetworkPolicy")}
    assert policies.keys() == {"ray", "mlflow", "postgres"}
    for policy in policies.values():
        assert policy["policyTypes"] == ["Ingress"]
        assert all("from" in rule for rule in policy["ingress"])
        # Pods of another namespace also need their own label.
        peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
        assert all("podSelector" in peer and "ipBlock" not in peer for peer in peers)
    database = policies["postgres"]["ingress"][0]["from"]
    (rule,) = [peer["podSelector"]["matchExpressions"][0] for peer in database]
    assert (rule["operator"], set(rule["values"])) == ("In", {"mlflow", "mlflow-gc"})


def test_aws_nodes_are_private() -> None:
    facts = render.facts()
    assert AWS["provider"]["use_internal_ips"] is True
    for node in NODES:
        assert node["SubnetIds"] == facts["subnets"]
        assert node["SecurityGroupIds"] == [facts["security_group"]]
        assert not {"NetworkInterfaces", "AssociatePublicIpAddress"} & node.keys()
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] is True for disk in node["BlockDeviceMappings"])
    # ssh goes through Session Manager: no open port, no security group that Ray would open one in, no shared key pair
    # (`ray up` creates one for its user).
    assert not [key for key in ("ssh_private_key", "ssh_public_key") if key in AWS["auth"]]
    assert "ssm start-session" in AWS["auth"]["ssh_proxy_command"]
    assert "security_group" not in AWS["provider"]
    assert not [node for node in NODES if "KeyName" in node]


def test_permissions_come_from_roles_and_no_file_has_secrets() -> None:
    assert {node["IamInstanceProfile"]["Name"] for node in NODES} == {"crosslmm-head", "crosslmm-node"}
    # Only the head may start instances.
    profiles = {
        name: one["node_config"]["IamInstanceProfile"]["Name"] for name, one in AWS["available_node_types"].items()
    }
    assert [name for name, profile in profiles.items() if profile == "crosslmm-head"] == ["head"]
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


def test_no_pod_has_unneeded_privileges() -> None:
    templates = [
        one["spec"] for document in MANIFESTS for one in values_of(document, "template") if "containers" in one["spec"]
    ]
    templates += [one["spec"] for document in MANIFESTS for one in values_of(document, "submitterPodTemplate")]
    assert len(templates) == 14
    # A pod's setting overrides its account's; the default of both is true.
    mounts = {
        one["metadata"]["name"]: one.get("automountServiceAccountToken", True) for one in of_kind("ServiceAccount")
    }
    for pod in templates:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
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
