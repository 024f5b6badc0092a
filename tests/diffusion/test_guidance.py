"""Guidance has one convention: 0 unconditional, 1 conditional, 2 as far again."""

import pytest
import torch

from raydistill.diffusion.guidance import extra_to_scale, guide

COND, UNCOND = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_scale_zero_ignores_the_condition_and_one_is_no_guidance_exactly():
    assert torch.equal(guide(COND, UNCOND, 0.0), UNCOND)
    assert torch.equal(guide(COND, UNCOND, 1.0), COND)


@pytest.mark.parametrize("scale", [-1.0, 0.3, 2.0, 7.5])
def test_guided_is_uncond_plus_scale_times_the_difference(scale):
    torch.testing.assert_close(
        guide(COND, UNCOND, scale), UNCOND + scale * (COND - UNCOND), rtol=1e-5, atol=1e-5
    )


def test_papers_with_an_extra_weight_agree():
    w = 0.75
    torch.testing.assert_close(guide(COND, UNCOND, extra_to_scale(w)), (1 + w) * COND - w * UNCOND)
