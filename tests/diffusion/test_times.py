"""Each time law has the moments and bounds it names, and doesn't notice how a batch is split."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.diffusion.random import Draws
from raydistill.diffusion.times import (
    DiscreteUniform,
    FixedSet,
    KarrasIndexUniform,
    KarrasUniform,
    LogitNormal,
    LogNormal,
    PairedTimes,
    karras_sigma,
)
from raydistill.errors import ConfigError

N = 8000
LAWS = {
    "discrete": DiscreteUniform(20, 980),
    "karras_index": KarrasIndexUniform(1000, 20, 980),
    "karras": KarrasUniform(0.8),
    "log_normal": LogNormal(),
    "logit_normal": LogitNormal(),
    "fixed": FixedSet((1.0, 0.75, 0.5, 0.25), (0.7, 0.1, 0.1, 0.1)),
    "paired": PairedTimes(4),
}


def many(law):
    return law.sample(Draws(seed=0), "t", 0, range(N))


def assert_uniform(u, low=0.0, high=1.0):
    """Kolmogorov-Smirnov distance from the uniform law, at about 1e-5."""
    u = ((u.double() - low) / (high - low)).sort().values
    steps = torch.arange(1, len(u) + 1) / len(u)
    assert u[0] >= 0
    assert u[-1] <= 1
    assert (u - steps).abs().max() < 2.5 / math.sqrt(len(u))


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x.double() / math.sqrt(2)))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(LAWS)),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=8),
    st.integers(0, 1000),
)
def test_levels_do_not_depend_on_how_the_batch_is_split(name, positions, step):
    def sample(p):
        levels = LAWS[name].sample(Draws(seed=9), "critic/t", step, p)
        return torch.stack(levels if name == "paired" else (levels,), dim=1)

    whole = sample(positions)
    assert whole.dtype == torch.float32
    assert whole.device.type == "cpu"
    assert torch.equal(torch.cat([sample([p]) for p in positions]), whole)
    assert torch.equal(sample(positions[::-1]), whole.flip(0))


@pytest.mark.parametrize("name", sorted(LAWS))
def test_levels_differ_between_steps_and_purposes(name):
    law = LAWS[name]

    def sample(purpose, step):
        levels = law.sample(Draws(seed=0), purpose, step, range(100))
        return levels[0] if name == "paired" else levels

    assert not torch.equal(sample("a", 0), sample("a", 1))
    assert not torch.equal(sample("a", 0), sample("b", 0))


def test_discrete_uniform_covers_both_ends_evenly():
    t = many(LAWS["discrete"])
    assert torch.equal(t, t.round())
    assert_uniform(t, 19.5, 980.5)
    small = many(DiscreteUniform(3, 6))
    counts = torch.bincount(small.long(), minlength=7)
    assert counts[:3].sum() == 0
    assert (counts[3:] - N / 4).abs().max() < 4 * math.sqrt(N * 3 / 16)
    assert many(DiscreteUniform(999, 999)).unique().tolist() == [999]


def test_karras_index_uniform_lies_on_dmd2s_grid():
    sigma = many(LAWS["karras_index"])
    grid = karras_sigma(torch.arange(1000).double() / 999, 0.002, 80, 7).float()
    index = torch.searchsorted(grid, sigma)
    assert torch.equal(grid[index], sigma)
    assert_uniform(index, 19.5, 980.5)
    # DMD2's distribution matching on EDM sees sigma in [.00323, 72.05] (methods.md, 1.3).
    ends = [KarrasIndexUniform(1000, i, i).sample(Draws(seed=0), "t", 0, [0]).item() for i in (20, 980)]
    assert ends == pytest.approx([0.00323, 72.05], rel=1e-3)


def test_karras_uniform_is_uniform_along_the_curve_and_ends_at_u_max():
    sigma = many(LAWS["karras"]).double()
    u = (sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert_uniform(u, -1e-6, 0.8 + 1e-6)
    assert sigma.max() < 24.5  # SiD's bound


def test_karras_curve_has_its_published_values():
    u = torch.tensor([0.0, 0.02, 0.5, 0.8, 0.98, 1.0])
    assert karras_sigma(u, 0.002, 80, 7).tolist() == pytest.approx(
        [0.002, 0.0032, 2.515, 24.4, 71.7, 80], rel=0.01
    )


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.4, 1.0)])
def test_log_normal_levels_have_normal_logarithms(mean, std):
    assert_uniform(normal_cdf((many(LogNormal(mean, std)).double().log() - mean) / std))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_logit_normal_levels_have_normal_logits_within_the_unit_interval(mean, std):
    t = many(LogitNormal(mean, std)).double()
    assert 0 < t.min() < t.max() < 1
    assert_uniform(normal_cdf((t.logit() - mean) / std))


def test_fixed_set_draws_each_level_with_its_probability():
    for law, shares in (
        (LAWS["fixed"], {1.0: 0.7, 0.75: 0.1, 0.5: 0.1, 0.25: 0.1}),
        (FixedSet((999.0, 749.0, 499.0, 249.0)), dict.fromkeys((999.0, 749.0, 499.0, 249.0), 0.25)),
        (FixedSet((1.0, 0.5, 0.25), (0.0, 1.0, 0.0)), {0.5: 1.0}),
    ):
        levels = many(law)
        assert set(levels.unique().tolist()) == set(shares)
        for level, share in shares.items():
            observed = (levels == level).double().mean().item()
            assert observed == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / N) + 1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 999.0)])
def test_paired_times_are_those_of_moment_matching(low, high):
    k = 4
    t, s = PairedTimes(k, low, high).sample(Draws(seed=0), "pair", 0, range(N))
    assert_uniform(s, low, high)
    assert (s <= t).all()
    assert t.max() <= high
    inside = s < high - (high - low) / k  # where t was not cut off at t_max
    assert_uniform((t - s)[inside], -1e-4 * high, (high - low) / k * (1 + 1e-4))
    correlation = torch.corrcoef(torch.stack([s[inside], (t - s)[inside]]))[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(inside.sum())


def test_one_step_pairs_reach_the_end_half_of_the_time():
    t, _ = PairedTimes(1).sample(Draws(seed=0), "pair", 0, range(N))
    assert (t == 1).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(N))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DiscreteUniform(5, 4), "low <= high"),
        (lambda: DiscreteUniform(-1, 4), "low"),
        (lambda: KarrasIndexUniform(1000, 20, 1000), "high < num"),
        (lambda: KarrasIndexUniform(1, 0, 0), "num >= 2"),
        (lambda: KarrasUniform(1.2), "u_max"),
        (lambda: KarrasUniform(1.0, sigma_min=3.0, sigma_max=1.0), "sigma_min"),
        (lambda: KarrasUniform(1.0, rho=0.0), "rho"),
        (lambda: LogNormal(0.0, 0.0), "std"),
        (lambda: LogitNormal(0.0, -1.0), "std"),
        (lambda: FixedSet(()), "empty"),
        (lambda: FixedSet((1.0, 0.5), (0.5, 0.6)), "sum to 1"),
        (lambda: FixedSet((1.0, 0.5), (1.0,)), "2 numbers"),
        (lambda: FixedSet((1.0, 0.5), (1.5, -0.5)), "sum to 1"),
        (lambda: PairedTimes(0), "num_steps"),
        (lambda: PairedTimes(2, 1.0, 1.0), "t_min < t_max"),
    ],
)
def test_a_law_that_can_not_be_is_refused(make, named):
    with pytest.raises(ConfigError, match=named):
        make()
