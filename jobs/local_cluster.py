"""A Ray cluster on this machine, with token authentication and its dashboard on loopback, until Ctrl-C.

One node with all of the machine's CPUs:

    python jobs/local_cluster.py

Several nodes, labelled as in clouds (cluster/facts.yaml), with any number of CPUs: Ray assigns them regardless of the
machine's cores. Each group of nodes is ROLE=NODESxCPUS; the head, where drivers run, has no CPUs to assign:

    python jobs/local_cluster.py --nodes
    python jobs/local_cluster.py --nodes decode=1x1 train=2x2

The same nodes, added on demand by an autoscaler, and removed when they have been idle:

    python jobs/local_cluster.py --nodes decode=1x1 train=2x2 --autoscale

It prints the commands for another terminal, with the --config file that places a run on these nodes.
"""

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the folder `cluster` is not installed

from cluster.local.cluster import LocalCluster
from cluster.local.nodes import NodeGroup, ray_command
from crosslmm.cli import CommandParser

DEFAULT_GROUPS = ("decode=1x1", "train=2x1")
"""Groups of `--nodes` without a value."""
DEFAULT_IDLE_S = 60.0
"""Idle time after which `--autoscale` removes a node [s]."""


def _group(text: str) -> NodeGroup:
    try:
        return NodeGroup.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Run a cluster until Ctrl-C."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nodes",
        nargs="*",
        type=_group,
        metavar="ROLE=NODESxCPUS",
        help=f"nodes in addition to the head, with the roles decode and train (default: {' '.join(DEFAULT_GROUPS)})",
    )
    parser.add_argument(
        "--autoscale",
        nargs="?",
        type=float,
        const=DEFAULT_IDLE_S,
        metavar="SECONDS",
        help=f"add nodes on demand, and remove those idle for this long (default {DEFAULT_IDLE_S:g})",
    )
    arguments = parser.parse_args()
    groups = [_group(text) for text in DEFAULT_GROUPS] if arguments.nodes == [] else arguments.nodes or []
    if arguments.autoscale is not None and not groups:
        parser.error("--autoscale needs --nodes: the most nodes that it may add")
    print("starting a Ray cluster ...", flush=True)
    with suppress(KeyboardInterrupt), LocalCluster(groups=groups, idle_s=arguments.autoscale) as cluster:
        placement = f" --config tiny --config {cluster.placement}" if groups else ""
        print(f"""Dashboard {cluster.address}. In another terminal, in the same folder:

  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token} RAY_API_SERVER_ADDRESS={cluster.address}
  {ray_command()[0]} job submit -- python jobs/train.py{placement}

Ctrl-C stops the cluster.""", flush=True)  # fmt: skip
        signal.pause()
    print("stopped")


if __name__ == "__main__":
    main()
