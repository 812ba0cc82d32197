"""Where a run's processes belong, whether there is room for them, and what the nodes that train decide."""

import dataclasses
import re

import pytest

from cluster.local.nodes import ROLE_LABEL, Group
from crosslmm.cli import parse_run, preset_names
from crosslmm.config import BadConfig, to_yaml
from crosslmm.preflight import placement
from crosslmm.preflight.hardware import (
    GPU_ENVIRONMENT,
    STORE,
    Hardware,
    describe,
    environment,
    object_store_warning,
    resolve_auto,
)
from crosslmm.preflight.placement import Nodes, check_driver, check_room, room_for, worker_resources
from crosslmm.train.run import changes
from jobs.local_cluster import _group

HEAD, DECODE, TRAIN = ({ROLE_LABEL: role} for role in ("head", "decode", "train"))
ON = (f'--scaling.train_on={{"{ROLE_LABEL}": "train"}}', f'--scaling.decode_on={{"{ROLE_LABEL}": "decode"}}')
H100 = Hardware("NVIDIA H100", bf16=True, flash=True, nccl="2.27.3")
V100 = Hardware("Tesla V100", bf16=False, flash=False, nccl="2.27.3")


def run(*overrides):
    # Two workers of half a CPU, one decoder of a quarter.
    return parse_run(list(overrides), "")


def nodes(decode=(1, 1), train=(2, 1), **more):
    made = [Nodes(1, {"CPU": 0, **more}, HEAD), Nodes(decode[0], {"CPU": decode[1]}, DECODE)]
    return [*made, Nodes(train[0], {"CPU": train[1], "train": train[1]}, TRAIN)]


def test_a_laptop_needs_no_labels():
    check_room(run(), [Nodes(1, {"CPU": 2.0}, {})])
    check_driver(run(), {"ray.io/node-id": "1"})


def test_with_labels_only_nodes_that_have_them_count():
    check_room(run(*ON), nodes())
    with pytest.raises(BadConfig, match=r"num_workers: 2 workers need 1.5 CPU each.*role=train \(2 x 1 CPU\).*for 0"):
        check_room(run(*ON, "--scaling.cpus_per_worker=1.5"), nodes(decode=(1, 64)))
    with pytest.raises(BadConfig, match=r"decode_workers: 5 decoders need 0.25 CPU each.*role=decode.*for 4; lower it"):
        check_room(run(*ON, "--scaling.decode_workers=5"), nodes(train=(2, 64)))


def test_workers_and_decoders_that_share_nodes_have_room_together_or_are_refused():
    shared = [Nodes(2, {"CPU": 1}, TRAIN)]
    both = (ON[0], f'--scaling.decode_on={{"{ROLE_LABEL}": "train"}}')
    check_room(run(*both, "--scaling.decode_workers=4"), shared)
    with pytest.raises(BadConfig, match=r"2 workers x cpus_per_worker 0.5 \+ 5 decoders x .* = 2.25 CPUs.*are 2;"):
        check_room(run(*both, "--scaling.decode_workers=5"), shared)


@pytest.mark.parametrize(
    ("overrides", "says"),
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
def test_a_refusal_is_one_line_that_names_key_and_remedy(overrides, says):
    with pytest.raises(BadConfig, match=says) as refusal:
        check_room(run(*overrides), nodes())
    assert "\n" not in str(refusal.value)


def test_elastic_workers_with_a_resource_of_their_own_are_counted_right():
    check_room(run(*ON, "--scaling.num_workers=[1, 2]", '--scaling.worker_resources={"train": 1}'), nodes())


def test_a_driver_on_another_node_is_refused_with_what_would_put_it_right():
    config = run(f'--scaling.drive_on={{"{ROLE_LABEL}": "head"}}')
    check_driver(config, HEAD | {"ray.io/node-id": "1"})
    with pytest.raises(BadConfig, match=r"drive_on: .*=head, and this one has .*=train.*--entrypoint-label-selector"):
        check_driver(config, TRAIN)
    with pytest.raises(BadConfig, match=r"this one has .*=none"):
        check_driver(config, {})


def test_trials_beside_one_another_are_as_many_as_the_scarcest_nodes_hold():
    config = run(*ON, "--scaling.num_workers=1", "--scaling.cpus_per_worker=1", "--data.validation_manifest=a.jsonl")
    assert room_for(config, nodes(decode=(1, 1), train=(2, 1)), 0.01) == 1  # its decoders take 0.51 of a CPU
    assert room_for(config, nodes(decode=(1, 2), train=(2, 1)), 0.01) == 2
    assert room_for(config, nodes(decode=(9, 2), train=(1, 1)), 0.01) == 1
    laptop = run("--config=tiny", "--config=tiny-sweep", "--data.validation_manifest=a.jsonl")
    assert room_for(laptop, [Nodes(1, {"CPU": 2.0}, {})], 0.01) == 2


def test_what_an_autoscaler_may_add_is_read_from_the_configuration():
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


def test_a_configuration_with_places_reads_back_the_same(tmp_path):
    config = run(
        *ON, f'--scaling.node_types=[{{"most": 2, "resources": {{"CPU": 1}}, "labels": {{"{ROLE_LABEL}": "a"}}}}]'
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert run(f"--config={tmp_path}/config.yaml") == config


@pytest.mark.parametrize("wrong", ['{"a b": "c"}', '{"a": "!c"}', '{"a": ""}', '{"a/b/c": "d"}', '{"a": 1}', "train"])
def test_labels_are_names_and_values_and_no_expressions(wrong):
    with pytest.raises(BadConfig, match=r"scaling\.train_on"):
        run(f"--scaling.train_on={wrong}")


def test_worker_resources_come_on_top():
    config = run("--scaling.use_gpu=true", '--scaling.worker_resources={"train": 1}')
    assert worker_resources(config) == {"CPU": 0.5, "GPU": 1.0, "train": 1.0}


AUTO = ("--train.precision=auto", "--model.attention=auto")


@pytest.mark.parametrize(
    ("stores", "warned"),
    # The blocks take 1.7 GB.
    [((8,), True), ((4, 3), True), ((9,), False), ((4, 5), False), ((4, None), False)],
)
def test_blocks_that_object_stores_do_not_hold_are_said_of_all_nodes_that_may_be_there(stores, warned, monkeypatch):
    # The last one is of a type that does not say what it has.
    there = [Nodes(2, {"CPU": 1} | ({} if store is None else {STORE: store * 10**8}), {}) for store in stores]
    monkeypatch.setattr(placement, "cluster", lambda config: there)
    said = object_store_warning(run("--data.num_frames=256"), 448, None)
    assert bool(said) is warned
    assert not said or f"object stores have {2 * sum(stores) / 10:.1f} GB, so that Ray spills to disk" in said


@pytest.mark.parametrize(
    ("use_gpu", "machine", "precision", "attention"),
    [
        ("false", Hardware(), "fp32", "sdpa"),
        ("true", H100, "bf16", "flash_attention_2"),
        ("true", dataclasses.replace(H100, flash=False), "bf16", "sdpa"),
        ("true", V100, "fp32", "sdpa"),
    ],
)
def test_what_is_open_is_settled_by_what_is_found(use_gpu, machine, precision, attention):
    config = resolve_auto(run(*AUTO, f"--scaling.use_gpu={use_gpu}"), machine)
    assert (config.train.precision, config.model.attention) == (precision, attention)
    assert resolve_auto(config, V100) == config
    line = describe(config, machine)
    assert f"{precision}, {attention}" in line
    assert "\n" not in line


def test_what_is_asked_for_is_left_as_it_is():
    config = run("--scaling.use_gpu=true", "--train.precision=fp32", "--model.attention=eager")
    assert resolve_auto(config, H100) == config
    with pytest.raises(BadConfig, match=r"flash_attention_2, which needs .*precision bf16"):
        resolve_auto(
            run("--scaling.use_gpu=true", "--train.precision=auto", "--model.attention=flash_attention_2"), V100
        )


def test_a_run_that_goes_on_does_not_change_its_precision_in_silence():
    config = run(*AUTO, "--scaling.use_gpu=true")
    before, now = (resolve_auto(config, machine).model_dump(mode="json") for machine in (H100, V100))
    assert changes(before, now) == {"train.precision": ("bf16", "fp32")}


def test_presets_for_gpus_leave_it_open_and_the_laptop_s_does_not():
    for name in ("paper-2b", "paper-7b"):
        assert name in preset_names()
        config = run(f"--config={name}", "--config=stage-1")
        assert (config.train.precision, config.model.attention, config.in_bf16) == ("auto", "auto", True)
    assert not run().in_bf16


def test_settings_of_gpus_are_the_user_s_where_there_are_some(monkeypatch):
    for name in GPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert environment(run()) == {}
    assert environment(run("--scaling.use_gpu=true")) == GPU_ENVIRONMENT
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert environment(run("--scaling.use_gpu=true"))["NCCL_DEBUG"] == "INFO"


def test_groups_of_a_local_cluster_are_named_on_its_command_line():
    assert _group("train=2x1") == Group("train", 2, 1)
    assert Group("train", 2, 3).resources == {"CPU": 3, "train": 3}
    for wrong in ("train", "train=2", "gpu=1x1", "train=ax1", "train=1x0", "head=1x1"):
        with pytest.raises(Exception, match=re.escape(wrong)):
            _group(wrong)
