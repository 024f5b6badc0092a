"""Denoisers on their way between processes: without weights there, whole again behind it."""

import pickle
from collections.abc import Callable

import pytest
import torch

from raydistill.models.denoiser import Denoiser, skeleton, with_weights
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.pipeline import Pipeline
from raydistill.runtime.build import build_pipeline
from tests.tiny import DIGITS, tiny_config, tiny_pipeline


def unet() -> Pipeline:
    return tiny_pipeline()


def edm() -> Pipeline:
    return build_pipeline(tiny_config(teacher=DIGITS))


@pytest.mark.parametrize("build", [unet, edm])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_skeleton_travels_without_weights_and_is_whole_again_with_them(
    build: Callable[[], Pipeline], dtype: str, layout: torch.memory_format
) -> None:
    pipeline = build()
    denoiser = pipeline.denoiser.cast(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    bare = skeleton(denoiser)
    state = bare.state_dict(keep_vars=True)
    assert state.keys() == denoiser.state_dict().keys()
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    # the original is left as it was
    assert not any(tensor.is_meta for tensor in denoiser.state_dict().values())
    sent = pickle.dumps(bare)
    assert len(sent) < 400 * len(state)

    weights = denoiser.state_dict()
    whole = with_weights(pickle.loads(sent), weights)
    assert isinstance(whole, type(denoiser))
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())
    for name, tensor in whole.state_dict().items():
        assert tensor.data_ptr() == weights[name].data_ptr()  # no copy
        assert tensor.stride() == weights[name].stride()
    x_t = torch.randn(3, *pipeline.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.3, 5.0, 60.0])
    cond = pipeline.encode_text(["7", "0", "3"])
    with torch.no_grad():
        for ask in ("__call__", "features"):
            assert torch.equal(getattr(whole, ask)(x_t, t, cond), getattr(denoiser, ask)(x_t, t, cond))
    assert whole.dtype == denoiser.dtype
    assert whole.schedule == denoiser.schedule


def test_skeleton_of_a_trainable_network_is_frozen_and_leaves_it_trainable() -> None:
    denoiser: Denoiser = EDMDenoiser.random(EDMNetConfig.digits(), seed=0)
    whole = with_weights(skeleton(denoiser), {n: t.detach() for n, t in denoiser.state_dict().items()})
    assert not any(p.requires_grad for p in whole.parameters())
    assert all(p.requires_grad for p in denoiser.parameters())


def test_hundreds_of_megabytes_travel_as_a_tenth_of_one() -> None:
    denoiser = EDMDenoiser.on_meta(EDMNetConfig.cifar10())
    assert sum(p.numel() for p in denoiser.parameters()) * 4 > 200e6
    assert len(pickle.dumps(skeleton(denoiser))) < 1e5
