"""Loaded before any test, and before torch."""

import os

# pytest-xdist's processes, and Ray's, share the cores; one thread each, or OpenMP's barriers wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
