"""What is refused before anything is allocated: too little memory, and what a remote network can't give."""

from typing import Any

import pytest

from raydistill.errors import PlacementError
from raydistill.runtime.fit import require_fit, require_memory
from raydistill.runtime.plan import GIB, Plan, plan
from raydistill.runtime.settings import RunConfig
from tests.tiny import tiny_config


def scenes(**placement: Any) -> RunConfig:
    return tiny_config(teacher={"path": "builtin:scenes", "guidance_scale": 2.0}, placement=placement)


APART = {"mode": "disaggregated", "workers": 4, "critic_ranks": 2, "teacher_replicas": 3}


def planned(config: RunConfig) -> tuple[Plan, dict[str, int]]:
    found = plan(config)
    return found, found.device_bytes


@pytest.mark.parametrize("placement", [{"workers": 2}, {"workers": 2, "mode": "teachers"}, APART])
def test_cpu_processes_must_fit_on_a_node_and_together_on_all(placement: dict[str, Any]) -> None:
    config = scenes(**placement)
    found, by_kind = planned(config)
    largest = max(by_kind.values())

    def together(nodes: int) -> int:  # a node's replicas map one copy of the weights
        teachers = min(nodes, config.placement.teacher_replicas)
        counts = {"worker": 2, "generator": 2, "critic": 2, "teacher": teachers}
        return sum(counts[kind] * size for kind, size in by_kind.items())

    require_memory(config, found, [together(1)])
    require_memory(config, found, [largest, together(2) - largest])
    with pytest.raises(PlacementError, match=rf"GiB of each .*a node has {(largest - 1) / GIB:.2f} GiB"):
        require_memory(config, found, [float(largest - 1)] * 100)
    with pytest.raises(PlacementError, match=rf"takes {together(2) / GIB:.2f} GiB of the nodes' memory"):
        require_memory(config, found, [float(largest), float(together(2) - largest - 1)])


def test_gpu_processes_must_fit_on_their_gpu_or_their_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"gpus_per_worker": 1, "gpus_per_teacher": 0.5}
    config = scenes(**APART, **gpus)
    found, by_kind = planned(config)
    trainers = max(by_kind["generator"], by_kind["critic"])

    def fits(gib: float | None) -> None:
        # CPU memory does not matter where nothing runs on CPUs
        require_memory(scenes(**APART, **gpus, device_gib=gib), found, [0.0])

    fits(trainers / GIB)
    with pytest.raises(PlacementError, match=r"a GPU has 0\.0\d GiB \(placement\.device_gib\): lower train"):
        fits((trainers - 1) / GIB)
    small = dict.fromkeys(("generator", "critic"), 0) | {"teacher": by_kind["teacher"]}
    monkeypatch.setattr(Plan, "device_bytes", property(lambda self: small))
    fits(2 * by_kind["teacher"] / GIB)
    with pytest.raises(PlacementError, match="of each teacher"):
        fits((2 * by_kind["teacher"] - 2) / GIB)


def test_unknown_gpu_memory_is_told_and_not_guessed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = scenes(gpus_per_worker=1)
    require_fit(config, [0.0])
    assert "placement.device_gib" in caplog.text
