"""Loaded before any test, and before torch."""

import os
from typing import Any

import pytest

# pytest-xdist's processes, and Ray's, share the cores; one thread each, or OpenMP's barriers wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = (
    "test_sweep.py", "test_run.py", "test_pool.py", "test_s3_outage.py", "test_compare.py", "test_prepare_pool.py",
    "test_live.py", "test_local_cluster.py",
)  # fmt: skip
# tests of minutes, which start what they need themselves
APART = ("test_run.py", "test_sweep.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start clusters come first, the longest before them, so that no process is left alone with them at
    the end."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (rank.get(item.path.name, len(rank)), item.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A module's tests run in one process, which starts its cluster, browser or server once; those APART one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class Modules(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            return nodeid if module.endswith(APART) else module

    return Modules(config, log) if config.getvalue("dist") == "loadscope" else None
