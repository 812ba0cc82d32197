"""A Ray cluster on this machine, with token authentication and its dashboard on loopback, until Ctrl-C.

One node with all of its CPUs:

    python jobs/local_cluster.py

Several nodes, with the labels that nodes in clouds have (cluster/facts.yaml), and as many CPUs as you like: Ray hands
them out, whatever the machine has. GROUP=NODESxCPUS; the head, from which jobs are driven, has no CPU to give:

    python jobs/local_cluster.py --nodes
    python jobs/local_cluster.py --nodes decode=1x1 train=2x2

Nodes that an autoscaler adds when they are asked for, up to so many, and takes away when they have been idle:

    python jobs/local_cluster.py --nodes decode=1x1 train=2x2 --autoscale

It prints what to type in another terminal. A run is told where its parts belong by the file that it names there.
"""

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # `cluster` is beside this folder, and not installed

from cluster.local.cluster import LocalCluster
from cluster.local.nodes import Group, ray

DEFAULT = ("decode=1x1", "train=2x1")
IDLE_S = 60.0


def _group(text: str) -> Group:
    """`train=2x1` -> two nodes of one CPU."""
    role, _, size = text.partition("=")
    nodes, _, cpus = size.partition("x")
    if role not in ("decode", "train") or not nodes.isdecimal() or not cpus.isdecimal() or not int(cpus):
        raise argparse.ArgumentTypeError(f"{text}: give decode=NODESxCPUS or train=NODESxCPUS, such as train=2x1")
    return Group(role, int(nodes), int(cpus))


def main() -> None:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nodes",
        nargs="*",
        type=_group,
        metavar="GROUP=NODESxCPUS",
        help=f"nodes beside the head, of the groups decode and train (without a group: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--autoscale",
        nargs="?",
        type=float,
        const=IDLE_S,
        metavar="SECONDS",
        help=f"add nodes when they are asked for, and take away those that were idle for so long (default {IDLE_S:g})",
    )
    arguments = parser.parse_args()
    groups = [_group(text) for text in DEFAULT] if arguments.nodes == [] else arguments.nodes or []
    if arguments.autoscale is not None and not groups:
        parser.error("--autoscale: give --nodes, that is what there may be")
    # A closed terminal and `kill` as Ctrl-C: nodes have sessions of their own, and would outlive this process.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    print("starting a Ray cluster ...", flush=True)
    with suppress(KeyboardInterrupt), LocalCluster(groups=groups, idle_s=arguments.autoscale) as cluster:
        where = f" --config tiny --config {cluster.placement}" if groups else ""
        print(f"""Dashboard {cluster.address}. In another terminal, in the same folder:

  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token} RAY_API_SERVER_ADDRESS={cluster.address}
  {ray()[0]} job submit -- python jobs/train.py{where}

Ctrl-C stops the cluster.""", flush=True)  # fmt: skip
        signal.pause()
    print("stopped")


if __name__ == "__main__":
    main()
