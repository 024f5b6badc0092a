"""Loaded before any test, and before torch."""

import os

import pytest

# pytest-xdist's processes, and Ray's, share the cores; one thread each, or OpenMP's barriers wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = {"test_run.py": 0, "test_sweep.py": 1, "test_live.py": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start clusters come first, the longest before them, so that no process is left alone with them at
    the end."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: (LONGEST.get(item.path.name, len(LONGEST)), item.path not in slow))
