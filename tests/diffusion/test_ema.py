"""EMA: its half-life is in images, however they are split, and it moves when told to only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from raydistill.diffusion.ema import EMA
from raydistill.errors import CheckpointError, ConfigError


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


def constant(value):
    module = nn.Linear(2, 2).double()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def fill(module, value):
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def test_after_one_half_life_the_first_weights_count_half():
    module = constant(0.0)
    ema = EMA(module, halflife_images=500)
    fill(module, 1.0)
    for _ in range(10):
        ema.update(50)
    assert ema.weights()["weight"].flatten().tolist() == pytest.approx([0.5] * 4, rel=1e-12)
    assert ema.images_seen == 500
    ema.update(500)
    assert ema.weights()["bias"].tolist() == pytest.approx([0.75] * 2, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=10))
def test_the_split_of_images_into_updates_does_not_matter(parts):
    split, whole = constant(0.0), constant(0.0)
    split_ema, whole_ema = EMA(split, halflife_images=300), EMA(whole, halflife_images=300)
    fill(split, 1.0)
    fill(whole, 1.0)
    for images in parts:
        split_ema.update(images)
    whole_ema.update(sum(parts))
    torch.testing.assert_close(split_ema.weights(), whole_ema.weights(), rtol=1e-12, atol=0)


def test_the_foreach_update_is_the_scalar_formula():
    module = network()
    ema = EMA(module, halflife_images=1000)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        images = 64 * (step + 1)
        ema.update(images)
        decay = 0.5 ** (images / 1000)
        for name, p in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, value in expected.items():
        torch.testing.assert_close(ema.weights()[name], value, rtol=1e-12, atol=1e-12)


def test_it_does_not_move_unless_updated_and_never_moves_the_module():
    module = network()
    ema = EMA(module, halflife_images=100)
    before = {name: tensor.clone() for name, tensor in ema.weights().items()}
    fill(module, 3.0)
    torch.testing.assert_close(ema.weights(), before, rtol=0, atol=0)
    ema.update(10)
    assert all((p == 3.0).all() for p in module.parameters())
    assert (ema.weights()["0.weight"] != before["0.weight"]).all()


def test_buffers_are_copied_not_averaged():
    module = network()
    ema = EMA(module, halflife_images=1e9)
    module(torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ema.update(16)
    for name, buffer in module.named_buffers():
        assert torch.equal(ema.weights()[name], buffer)
    assert ema.weights()["1.num_batches_tracked"].item() == 1


def test_a_ramp_caps_the_half_life_at_its_share_of_the_images_seen():
    module = constant(0.0)
    ema = EMA(module, halflife_images=1000, ramp=0.05)
    fill(module, 1.0)
    ema.update(100)
    assert ema.weights()["bias"].tolist() == [1.0, 1.0]  # nothing seen before: the weights are copied
    fill(module, 0.0)
    ema.update(100)
    assert ema.weights()["bias"][0].item() == pytest.approx(0.5 ** (100 / (0.05 * 100)), rel=1e-12)
    ema.load({name: torch.ones_like(w) for name, w in ema.weights().items()}, images_seen=10**6)
    ema.update(100)
    assert ema.weights()["bias"][0].item() == pytest.approx(0.5 ** (100 / 1000), rel=1e-12)


def test_bfloat16_weights_are_averaged_in_float32():
    module = nn.Linear(2, 2).bfloat16()
    fill(module, 1.0)
    ema = EMA(module, halflife_images=1e5)
    fill(module, 2.0)
    for _ in range(100):
        ema.update(10)
    average = ema.weights()["weight"]
    assert average.dtype == torch.float32
    assert average.flatten().tolist() == pytest.approx([2 - 0.5**0.01] * 4, abs=1e-5)


def test_a_saved_average_goes_on_bit_for_bit():
    module = network()
    ema = EMA(module, halflife_images=200, ramp=0.3)

    def train(ema, step):
        fill(module, float(step))
        ema.update(32)

    for step in range(4):
        train(ema, step)
    saved, seen = {name: tensor.clone() for name, tensor in ema.weights().items()}, ema.images_seen
    for step in range(4, 8):
        train(ema, step)
    resumed = EMA(network(seed=5), halflife_images=200, ramp=0.3)
    resumed._module = module
    resumed.load(saved, images_seen=seen)
    for step in range(4, 8):
        train(resumed, step)
    for name, tensor in ema.weights().items():
        assert torch.equal(resumed.weights()[name], tensor)


def test_copy_to_makes_a_module_of_the_average_in_its_own_dtype():
    module = network()
    ema = EMA(module, halflife_images=10)
    fill(module, 1.0)
    ema.update(10)
    other = network(seed=1, dtype=torch.float32)
    ema.copy_to(other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, ema.weights()[name].to(tensor.dtype))
    assert next(other.parameters()).dtype == torch.float32
    before = other[0].weight.clone()
    ema.update(10)
    assert torch.equal(other[0].weight, before)


def test_tied_weights_stay_tied():
    module = nn.Module()
    module.first, module.second = nn.Linear(2, 2), nn.Linear(2, 2)
    module.second.weight = module.first.weight
    ema = EMA(module, halflife_images=10)
    fill(module, 1.0)
    ema.update(7)
    assert ema.weights().keys() == module.state_dict().keys()
    assert torch.equal(ema.weights()["first.weight"], ema.weights()["second.weight"])


def test_wrong_settings_and_weights_are_refused():
    module = network()
    with pytest.raises(ConfigError, match="half-life"):
        EMA(module, halflife_images=0)
    with pytest.raises(ConfigError, match="ramp"):
        EMA(module, halflife_images=1, ramp=0.0)
    ema = EMA(module, halflife_images=1)
    with pytest.raises(ValueError, match="at least 1 image"):
        ema.update(0)
    good = {name: tensor.clone() for name, tensor in ema.weights().items()}
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        ema.load({name: tensor for name, tensor in good.items() if name != "0.bias"})
    with pytest.raises(CheckpointError, match="shape"):
        ema.load(good | {"0.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match="images_seen"):
        EMA(module, halflife_images=1, ramp=0.1).load(good)
