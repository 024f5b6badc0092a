"""A Ray cluster of several nodes on one machine: real raylets, for trying placements and for killing them.

    python cluster/local_nodes.py --nodes 3 --cpus 2

starts a head and the other nodes, prints how to join them, and runs until Ctrl-C. The head takes no work unless
--head-cpus gives it some, so that any other node may be killed without the driver. All of it listens on 127.0.0.1, and
ends with this process.

The CPUs are what each raylet says it has, not what the machine has.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from types import TracebackType
from typing import Any

# read by Ray when it is imported, and by the processes that it starts: see raydistill/runtime/local_cluster.py
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

OBJECT_STORE_BYTES = 128 * 2**20


class LocalNodes:
    """A head and `nodes - 1` others; a context manager, to be used from the main thread."""

    def __init__(self, nodes: int, cpus: int, head_cpus: int = 0):
        """cpus: of every node but the head. Raises ValueError if there is no node to work on."""
        if nodes < 1 or cpus < 1 or head_cpus < 0 or (nodes == 1 and not head_cpus):
            raise ValueError(
                f"nodes={nodes}, cpus={cpus}, head_cpus={head_cpus} leave no node with a CPU: "
                "at least two nodes, or a head with CPUs"
            )
        self._nodes, self._cpus, self._head_cpus = nodes, cpus, head_cpus
        self._cluster: Any = None

    def __enter__(self) -> LocalNodes:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._add(
            self._head_cpus, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=_free_port()
        )
        for _ in range(self._nodes - 1):
            self.add()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return str(self._cluster.address)

    @property
    def dashboard(self) -> str:
        """URL of the dashboard and job server."""
        return f"http://{self._cluster.webui_url}"

    def add(self) -> str:
        """Another node; returns its id."""
        return self._add(self._cpus)

    def node_of(self, pid: int) -> str:
        """The node that a worker process belongs to. Raises KeyError for a process of no node but the head."""
        import psutil

        above = {parent.pid for parent in psutil.Process(pid).parents()}
        raylets = {
            each.process.pid: node.node_id
            for node in self._cluster.worker_nodes
            for each in node.all_processes["raylet"]
        }
        return str(raylets[next(iter(above & raylets.keys()), -1)])

    def kill(self, node_id: str) -> None:
        """SIGKILL to a raylet; its workers die with it. Raises KeyError if there is no such node but the head."""
        by_id = {node.node_id: node for node in self._cluster.worker_nodes}
        self._cluster.remove_node(by_id[node_id], allow_graceful=False)

    def _add(self, cpus: int, **more: Any) -> str:
        node = self._cluster.add_node(
            num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, node_ip_address="127.0.0.1", **more
        )
        return str(node.node_id)


def _free_port() -> int:
    from raydistill.runtime.local_cluster import free_ports

    return free_ports(1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3, help="raylets, the head among them (%(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of every node but the head (%(default)s)")
    parser.add_argument("--head-cpus", type=int, default=0, help="CPUs of the head (%(default)s)")
    arguments = parser.parse_args()
    try:
        nodes = LocalNodes(arguments.nodes, arguments.cpus, arguments.head_cpus)
    except ValueError as error:
        parser.error(str(error))
    stop = threading.Event()
    with nodes:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"export RAY_ADDRESS={nodes.address}      # python jobs/dmd2_coco.py joins it")
        print(f"ray job submit --address {nodes.dashboard} --working-dir . -- python jobs/dmd2_coco.py")
        print("Ctrl-C ends it", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
