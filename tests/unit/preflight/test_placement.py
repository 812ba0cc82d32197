"""Which nodes a run's processes belong on, and whether the cluster has room for them."""

import re

import pytest

from cluster.local.nodes import ROLE_LABEL, NodeGroup
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, to_yaml
from crosslmm.preflight.placement import (
    NodePool,
    check_driver,
    check_resources,
    max_concurrent_runs,
    worker_resources,
)

HEAD, DECODE, TRAIN = ({ROLE_LABEL: role} for role in ("head", "decode", "train"))
ON = (f'--scaling.train_on={{"{ROLE_LABEL}": "train"}}', f'--scaling.decode_on={{"{ROLE_LABEL}": "decode"}}')


def run(*overrides):
    # The tiny preset: two workers of half a CPU, one decoder of a quarter.
    return parse_run(list(overrides), "")


def node_pools(decode=(1, 1), train=(2, 1), **more):
    return [
        NodePool(1, {"CPU": 0, **more}, HEAD),
        NodePool(decode[0], {"CPU": decode[1]}, DECODE),
        NodePool(train[0], {"CPU": train[1], "train": train[1]}, TRAIN),
    ]


def test_a_laptop_needs_no_labels():
    check_resources(run(), [NodePool(1, {"CPU": 2.0}, {})])
    check_driver(run(), {"ray.io/node-id": "1"})


def test_only_nodes_with_the_labels_count():
    check_resources(run(*ON), node_pools())
    with pytest.raises(BadConfig, match=r"num_workers: 2 workers need 1.5 CPU each.*role=train \(2 x 1 CPU\).*for 0"):
        check_resources(run(*ON, "--scaling.cpus_per_worker=1.5"), node_pools(decode=(1, 64)))
    with pytest.raises(BadConfig, match=r"decode_workers: 5 decoders need 0.25 CPU, .*role=decode.*for 4; lower it"):
        check_resources(run(*ON, "--scaling.decode_workers=5"), node_pools(train=(2, 64)))


def test_workers_and_decoders_on_shared_nodes_must_fit_together():
    shared = [NodePool(2, {"CPU": 1}, TRAIN)]
    both = (ON[0], f'--scaling.decode_on={{"{ROLE_LABEL}": "train"}}')
    check_resources(run(*both, "--scaling.decode_workers=4"), shared)
    with pytest.raises(BadConfig, match=r"2 workers x cpus_per_worker 0.5 \+ 5 decoders x .* = 2.25 CPUs.*are 2;"):
        check_resources(run(*both, "--scaling.decode_workers=5"), shared)


def test_elastic_workers_leave_room_for_decoders():
    """Ray Train would place four workers, and the decoder would wait for ever."""
    laptop = [NodePool(1, {"CPU": 2.0}, {})]
    check_resources(run("--scaling.num_workers=[1, 3]"), laptop)
    check_resources(run("--scaling.num_workers=[1, 4]", "--scaling.cpus_per_worker=0.7"), laptop)
    with pytest.raises(BadConfig, match=r"4 workers x cpus_per_worker 0.5 \+ 1 decoders x .* = 2.25 CPUs.*are 2;"):
        check_resources(run("--scaling.num_workers=[1, 4]"), laptop)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (('--scaling.train_on={"zone": "a"}',), r"scaling\.train_on: no node has zone=a; there are zone=none"),
        (
            (f'--scaling.decode_on={{"{ROLE_LABEL}": "gpu"}}',),
            r"scaling\.decode_on: no node has .*=gpu; there are .*=decode and .*=head and .*=train",
        ),
        (("--scaling.use_gpu=true",), r"num_workers: 2 workers need 0.5 CPU, 1 GPU each.*scaling\.use_gpu false"),
        ((*ON, '--scaling.worker_resources={"fast": 1}'), r"need 0.5 CPU, 1 fast each, and .*\(2 x 1 CPU, 0 fast\)"),
        (
            (*ON, "--scaling.num_workers=[1, 2]"),
            r"scaling\.worker_resources: with num_workers \[1, 2\] Ray Train counts the room on all nodes",
        ),
    ],
)
def test_a_refusal_is_one_line_with_key_and_remedy(overrides, message):
    with pytest.raises(BadConfig, match=message) as refusal:
        check_resources(run(*overrides), node_pools())
    assert "\n" not in str(refusal.value)


GIB = 2**30


def test_decoders_fit_the_memory_of_their_nodes():
    """The tiny preset has a limit of 1 GiB a decoder."""
    check_resources(run(*ON, "--scaling.decode_workers=4"), node_pools(decode=(0, 1)) + room_of(2) + room_of(2))
    with pytest.raises(
        BadConfig,
        match=r"decode_workers: 4 decoders need 0.25 CPU, 1 GiB memory each.*1 x 1 CPU, 3.5 GiB memory\) have room "
        r"for 3; lower it or scaling.cpus_per_decode_worker or data.decode_memory_gib$",
    ):
        check_resources(run(*ON, "--scaling.decode_workers=4"), node_pools(decode=(0, 1)) + room_of(3.5))
    check_resources(
        run(*ON, "--scaling.decode_workers=4", "--data.decode_memory_gib=0.8"), node_pools(decode=(0, 1)) + room_of(3.5)
    )


def room_of(gib):
    return [NodePool(1, {"CPU": 1, "memory": gib * GIB}, DECODE)]


def test_decoders_of_validation_need_memory_too():
    both = run(*ON, "--scaling.decode_workers=2", "--data.validation_manifest=a.jsonl")
    with pytest.raises(BadConfig, match=r"4 decoders, half of them for validation, .* have room for 3"):
        check_resources(both, node_pools(decode=(0, 1)) + room_of(3.5))


def test_a_run_that_reads_features_decodes_nothing():
    reads = run(*ON, "--scaling.decode_workers=4", "--data.features=somewhere", "--train.learning_rate.vision=0")
    check_resources(reads, node_pools(decode=(0, 1)) + room_of(0.1))


def test_memory_limits_concurrent_runs():
    config = run(*ON, "--scaling.num_workers=1", "--scaling.cpus_per_worker=0.1")
    assert max_concurrent_runs(config, node_pools(decode=(0, 1)) + room_of(2.5), 0.01) == 2


def test_elastic_workers_with_their_own_resource_are_accepted():
    check_resources(run(*ON, "--scaling.num_workers=[1, 2]", '--scaling.worker_resources={"train": 1}'), node_pools())


def test_a_driver_on_the_wrong_node_is_refused_with_the_remedy():
    config = run(f'--scaling.drive_on={{"{ROLE_LABEL}": "head"}}')
    check_driver(config, HEAD | {"ray.io/node-id": "1"})
    with pytest.raises(BadConfig, match=r"drive_on: .*=head, and this one has .*=train.*--entrypoint-label-selector"):
        check_driver(config, TRAIN)
    with pytest.raises(BadConfig, match=r"this one has .*=none"):
        check_driver(config, {})


def test_the_scarcest_nodes_limit_concurrent_runs():
    config = run(*ON, "--scaling.num_workers=1", "--scaling.cpus_per_worker=1", "--data.validation_manifest=a.jsonl")
    assert (
        max_concurrent_runs(config, node_pools(decode=(1, 1), train=(2, 1)), 0.01) == 1
    )  # its decoders take 0.51 of a CPU
    assert max_concurrent_runs(config, node_pools(decode=(1, 2), train=(2, 1)), 0.01) == 2
    assert max_concurrent_runs(config, node_pools(decode=(9, 2), train=(1, 1)), 0.01) == 1
    laptop = run("--config=tiny", "--config=tiny-sweep", "--data.validation_manifest=a.jsonl")
    assert max_concurrent_runs(laptop, [NodePool(1, {"CPU": 2.0}, {})], 0.01) == 2


def test_node_types_are_read_from_the_configuration():
    types = [
        {"most": 2, "resources": {"CPU": 1, "train": 1}, "labels": TRAIN},
        {"most": 1, "resources": {"CPU": 1}, "labels": DECODE},
    ]
    config = run(*ON, f"--scaling.node_types={types!r}".replace("'", '"'))
    assert [(one.most, one.resources, one.labels) for one in config.scaling.node_types] == [
        (one["most"], one["resources"], one["labels"]) for one in types
    ]
    with pytest.raises(BadConfig, match=r"scaling\.node_types.*most.*greater than or equal to 1"):
        run('--scaling.node_types=[{"most": 0, "resources": {"CPU": 1}}]')


def test_a_configuration_with_labels_round_trips(tmp_path):
    config = run(
        *ON, f'--scaling.node_types=[{{"most": 2, "resources": {{"CPU": 1}}, "labels": {{"{ROLE_LABEL}": "a"}}}}]'
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert run(f"--config={tmp_path}/config.yaml") == config


@pytest.mark.parametrize("invalid", ['{"a b": "c"}', '{"a": "!c"}', '{"a": ""}', '{"a/b/c": "d"}', '{"a": 1}', "train"])
def test_labels_are_plain_names_and_values(invalid):
    with pytest.raises(BadConfig, match=r"scaling\.train_on"):
        run(f"--scaling.train_on={invalid}")


def test_worker_resources_are_added_to_cpus_and_gpu():
    config = run("--scaling.use_gpu=true", '--scaling.worker_resources={"train": 1}')
    assert worker_resources(config) == {"CPU": 0.5, "GPU": 1.0, "train": 1.0}


def test_a_local_cluster_parses_its_node_groups():
    assert NodeGroup.parse("train=2x1") == NodeGroup("train", 2, 1)
    assert NodeGroup("train", 2, 3).resources == {"CPU": 3, "train": 3}
    for invalid in ("train", "train=2", "gpu=1x1", "train=ax1", "train=1x0", "head=1x1"):
        with pytest.raises(ValueError, match=re.escape(invalid)):
            NodeGroup.parse(invalid)
