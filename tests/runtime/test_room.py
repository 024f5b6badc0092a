"""Where services go so that the workers still fit."""

from typing import Any

import pytest

from raydistill.errors import PlacementError
from raydistill.runtime.room import check_room, worker_cpus
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("nodes", "placement", "evaluator", "teachers"),
    [
        # a worker takes a whole node, so both replicas share the other one
        (
            [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}],
            {"workers": 1, "gpus_per_worker": 4, "mode": "teachers", "teacher_replicas": 2, "gpus_per_teacher": 1.0},
            (),
            (0, 0),
        ),
        # node 1 has a GPU that no worker could have, for want of a CPU
        (
            [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 0.0, "GPU": 1.0}],
            {"workers": 2, "gpus_per_worker": 1, "evaluator_gpus": 0.5},
            (1,),
            (),
        ),
        # one GPU is enough for both services
        (
            [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}],
            {
                "workers": 3, "gpus_per_worker": 1, "evaluator_gpus": 0.5, "mode": "teachers", "gpus_per_teacher": 0.5,
            },
            (0,),
            (0,),
        ),
        ([{"CPU": 2.0}], {"workers": 2, "mode": "teachers", "teacher_replicas": 2}, (), ()),
        # ten tenths are one, also in floats
        (
            [{"CPU": 3.0}],
            {"workers": 2, "mode": "teachers", "teacher_replicas": 10, "cpus_per_teacher": 0.1},
            (),
            (0,) * 10,
        ),
    ],
)  # fmt: skip
def test_services_go_where_they_cost_the_fewest_workers_places(
    nodes: list[dict[str, float]],
    placement: dict[str, Any],
    evaluator: tuple[int, ...],
    teachers: tuple[int, ...],
) -> None:
    taken = check_room(nodes, tiny_config(placement=placement), cpus=1)
    assert taken == {"evaluator": evaluator, "teachers": teachers}


@pytest.mark.parametrize(
    ("nodes", "placement", "named"),
    [
        # enough CPUs on one node and enough GPUs on another are not a place
        (
            [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}],
            {"workers": 1, "mode": "teachers", "cpus_per_teacher": 4.0, "gpus_per_teacher": 1.0},
            r"placement\.teacher_replicas=1 x placement\.cpus_per_teacher=4 with placement\.teacher_replicas=1 x "
            r"placement\.gpus_per_teacher=1 does not fit: the nodes have 8, 1 CPUs; the nodes have 0, 1 GPUs",
        ),
        (
            [{"CPU": 2.0}, {"CPU": 0.0, "GPU": 2.0}],
            {"workers": 2, "gpus_per_worker": 1},
            r"placement\.workers=2 x placement\.cpus_per_worker=1 with placement\.gpus_per_worker=1 does not fit",
        ),
        # two GPUs of which 0.4 is left each have no room for 0.6
        (
            [{"CPU": 8.0, "GPU": 2.0}],
            {"workers": 1, "mode": "teachers", "teacher_replicas": 3, "gpus_per_teacher": 0.6},
            r"placement\.teacher_replicas=3 x placement\.gpus_per_teacher=0\.6 does not fit: the nodes have 2 GPUs",
        ),
        (
            [{"CPU": 1.0, "GPU": 8.0}],
            {"workers": 8, "gpus_per_worker": 1},
            r"placement\.workers=8 x placement\.cpus_per_worker=1 does not fit: the nodes have 1 CPUs",
        ),
    ],
)
def test_cpus_and_gpus_must_be_on_the_same_node(
    nodes: list[dict[str, float]], placement: dict[str, Any], named: str
) -> None:
    with pytest.raises(PlacementError, match=named):
        check_room(nodes, tiny_config(placement=placement), cpus=1)


def test_every_evaluator_of_a_figure_has_its_share_of_a_gpu() -> None:
    config = tiny_config(
        placement={"workers": 1, "gpus_per_worker": 1, "evaluator_gpus": 1.0}, evaluator={"workers": 2}
    )
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert check_room(nodes, config, cpus=1)["evaluator"] == (1, 0)
    named = r"beside evaluator\.workers=2 x placement\.evaluator_gpus=1 does not fit: the nodes have 2 GPUs"
    with pytest.raises(PlacementError, match=named):
        check_room(nodes[:1], config, cpus=1)


def test_share_of_the_cpus_leaves_a_place_for_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 2.0}]
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    for workers, share in ((1, 8), (2, 4), (3, 2), (5, 2), (10, 1)):
        config = tiny_config(placement={"workers": workers})
        assert worker_cpus(config) == share
        check_room(nodes, config, share)
