"""What `raydistill plan --device-gib` suggests: it fits, the next larger does not, and a refusal's advice is true."""

import re
from dataclasses import replace

import pytest

from raydistill.config import apply_overrides
from raydistill.errors import PlacementError
from raydistill.runtime.fitting import MARGIN, largest_micro_batch, remedy
from raydistill.runtime.placements import compare, suggested
from raydistill.runtime.plan import GIB, plan
from raydistill.runtime.settings import RunConfig, TeacherConfig
from tests.tiny import tiny_config


def scenes(**train: object) -> RunConfig:
    return tiny_config(
        teacher={"path": "builtin:scenes", "guidance_scale": 1.5},
        train={"batch_size": 32} | train,
        placement={"workers": 1},
    )


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    config = scenes()
    planned = plan(config)
    whole = compare(config, planned, 1, 1)[0]
    need = {}
    for micro in (1, 8, 32):
        changed = scenes(micro_batch_size=micro)
        need[micro] = max(compare(changed, plan(changed), 1, 1)[0].device_bytes.values()) / GIB
    assert need[1] < need[8] < need[32]
    fitting = largest_micro_batch(config, planned, whole, 1, need[32] * MARGIN * 1.001)
    assert fitting is not None
    assert fitting.micro_batch_size == 32
    assert fitting.fullest_bytes / GIB == pytest.approx(need[32], rel=1e-3)
    # activations are taken to be proportional to it
    between = largest_micro_batch(config, planned, whole, 1, 0.5 * MARGIN * (need[8] + need[32]))
    assert between is not None
    assert between.micro_batch_size in (8, 16)
    assert largest_micro_batch(config, planned, whole, 1, need[1]) is None


def test_advice_of_a_refusal_is_true_and_names_what_it_takes() -> None:
    config = scenes()
    full = max(compare(config, plan(config), 1, 1)[0].device_bytes.values()) / GIB
    small = scenes(micro_batch_size=1)
    least = max(compare(small, plan(small), 1, 1)[0].device_bytes.values()) / GIB
    with pytest.raises(PlacementError, match="no placement fits"):
        suggested(compare(config, plan(config), 1, 1), 0.5 * (least + full))
    # below what micro-batches alone give, so more has to change
    limit = 0.97 * least
    advice = remedy(config, [(1, 1)], limit)
    found = re.fullmatch(
        r"([\d.]+) GiB would fit: (.*) placement\.mode=colocated placement\.workers=1", advice
    )
    assert found is not None, advice
    advised = apply_overrides(config, found[2].split())
    assert advised.train.micro_batch_size == 1
    assert suggested(compare(advised, plan(advised), 1, 1), limit).layout.mode == "colocated"
    refused = remedy(config, [(1, 1)], 1e-6)
    assert refused.startswith("even train.micro_batch_size=1 train.activation_checkpointing")
    assert refused.endswith("larger or more devices are needed")


def test_adapters_are_advised_where_whole_networks_do_not_fit() -> None:
    sdxl = replace(scenes(), teacher=TeacherConfig(path="random:sdxl", guidance_scale=8.0))
    advice = remedy(sdxl, [(1, 1)], 24.0)
    found = re.fullmatch(
        r"even train\.micro_batch_size=1 .* takes ([\d.]+) GiB of the fullest device; adapters instead, which want "
        r"higher learning rates: ([\d.]+) GiB would fit: (.*) placement\.mode=colocated placement\.workers=1",
        advice,
    )
    assert found is not None, advice
    assert float(found[2]) < 24 < float(found[1])
    advised = apply_overrides(sdxl, found[3].split())
    assert advised.generator.lora is not None
    assert advised.critic.lora is not None
    assert plan(advised).total_bytes / GIB == pytest.approx(float(found[2]), abs=0.01)
