"""How busy the machine of a rank is: figures for MLflow's tab of system metrics, through the journal like all others.

MLflow's own monitor is a thread that asks the server every few seconds and ends when it does not answer.
"""

from __future__ import annotations

import time
from contextlib import suppress

import psutil
import torch

EVERY_S = 10.0


class NodeLoad:
    """CPU and memory of this node and of this rank's GPU; asking takes about a millisecond and waits for nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self._next = 0.0
        psutil.cpu_percent()  # the first answer counts from here

    def sample(self) -> dict[str, float]:
        """Figures by their names in METRICS; none within 10 s of the last ones."""
        now = time.monotonic()
        if now < self._next:
            return {}
        self._next = now + EVERY_S
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": used / 1e6,
            "system_memory_usage_percentage": 100 * used / memory.total,
        }
        if self._device.type == "cuda":
            gpu = f"gpu_{self._device.index or 0}"
            free, total = torch.cuda.mem_get_info(self._device)
            figures[f"{gpu}_memory_usage_megabytes"] = (total - free) / 1e6
            figures[f"{gpu}_memory_usage_percentage"] = 100 * (total - free) / total
            with suppress(Exception):  # no nvidia-ml-py, or a driver that does not say: many kinds
                figures[f"{gpu}_utilization_percentage"] = float(torch.cuda.utilization(self._device))
        return {f"system/{name}": float(value) for name, value in figures.items()}
