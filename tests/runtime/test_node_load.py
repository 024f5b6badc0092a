import time

import psutil
import pytest
import torch

from raydistill.runtime import node_load
from raydistill.runtime.node_load import NodeLoad
from raydistill.tracking import check_metric_names


def test_figures_are_the_nodes_own_under_known_names_and_come_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_load, "EVERY_S", 600.0)
    load = NodeLoad(torch.device("cpu"))
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    figures = load.sample()
    check_metric_names(figures)
    # one core was busy all the time
    cores = psutil.cpu_count()
    assert cores is not None
    assert 50 / cores < figures["system/cpu_utilization_percentage"] <= 100
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    assert figures["system/system_memory_usage_megabytes"] == pytest.approx(used / 1e6, rel=0.2)
    assert load.sample() == {}
    monkeypatch.setattr(node_load, "EVERY_S", 0.0)
    often = NodeLoad(torch.device("cpu"))
    assert often.sample().keys() == often.sample().keys() == figures.keys()
