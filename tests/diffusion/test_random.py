"""Draws: the same numbers for a sample whatever batch asks, other numbers for anything else."""

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.diffusion.random import Draws

N = 20_000
GOLDEN = {
    "normal": [-0.184072524, 0.934536576, 0.909092188, 0.635731578, -0.747234046, 1.17486358],
    "uniform": [0.16037544717258523, 0.3933966956828092],
    "integers": [213, 116, 502, 137],
    "shared": 681966,
    "permutation": [3, 1, 5, 4, 0, 2],
}


def test_the_stream_has_not_changed():
    # Snapshots and published figures rest on these numbers: a change here breaks every resumed run.
    draws = Draws(seed=1234)
    assert draws.normal("generator/noise", 7, [0, 5], (3,)).flatten().tolist() == pytest.approx(
        GOLDEN["normal"], rel=1e-6
    )
    assert draws.uniform("generator/time", 7, [0, 5]).tolist() == pytest.approx(GOLDEN["uniform"], rel=1e-15)
    assert draws.integers("caption", 3, [0, 1, 2, 3], 0, 1000).tolist() == GOLDEN["integers"]
    assert draws.shared_integer("rollout", 11, 0, 1_000_000) == GOLDEN["shared"]
    assert draws.permutation("shards", 2, 6).tolist() == GOLDEN["permutation"]


def test_each_position_starts_a_fresh_philox_at_its_own_counter():
    key = np.frombuffer(hashlib.blake2b(b"8/x", digest_size=16).digest(), dtype="<u8")
    drawn = Draws(seed=8).normal("x", 6, [41, 42], (5,))
    for row, position in zip(drawn, (41, 42), strict=True):
        fresh = np.random.Generator(np.random.Philox(key=key, counter=[0, position, 6, 0]))
        assert row.tolist() == fresh.standard_normal(5, dtype=np.float32).tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12), st.integers(0, 2**31), st.data())
def test_a_sample_is_the_same_in_any_batch(positions, step, data):
    draws = Draws(seed=3)
    order = data.draw(st.permutations(range(len(positions))))
    shuffled = [positions[i] for i in order]
    for draw in (
        lambda p: draws.normal("x", step, p, (2, 3)),
        lambda p: draws.uniform("x", step, p),
        lambda p: draws.integers("x", step, p, -5, 1000),
    ):
        batch = draw(positions)
        assert torch.equal(draw(shuffled), batch[list(order)])
        assert torch.equal(torch.cat([draw([p]) for p in positions]), batch)


def test_positions_may_be_lists_ranges_arrays_and_tensors():
    draws = Draws(seed=0)
    expected = draws.uniform("x", 0, [0, 1, 2, 3])
    for positions in (range(4), np.arange(4), np.arange(4, dtype=np.int32), torch.arange(4)):
        assert torch.equal(draws.uniform("x", 0, positions), expected)
    assert draws.normal("x", 0, [], (3, 2)).shape == (0, 3, 2)


def test_different_seeds_purposes_steps_and_positions_are_uncorrelated():
    streams = torch.stack(
        [
            Draws(seed=0).normal("a", 0, [0], (N,))[0],
            Draws(seed=1).normal("a", 0, [0], (N,))[0],
            Draws(seed=0).normal("b", 0, [0], (N,))[0],
            Draws(seed=0).normal("a", 1, [0], (N,))[0],
            Draws(seed=0).normal("a", 0, [1], (N,))[0],
        ]
    )
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 4.5 / N**0.5


def test_seed_and_purpose_can_not_be_confused():
    # A key made of the two texts alone would make (1, "2x") and (12, "x") the same stream.
    assert Draws(seed=1).uniform("2x", 0, [0]) != Draws(seed=12).uniform("x", 0, [0])


def test_kinds_of_draws_with_one_purpose_are_independent():
    draws = Draws(seed=0)
    uniform = draws.uniform("x", 0, range(4000))
    integers = draws.integers("x", 0, range(4000), 0, 2**32).double()
    normal = draws.normal("x", 0, range(4000), ()).double()
    correlation = torch.corrcoef(torch.stack([uniform, integers, normal])) - torch.eye(3)
    assert correlation.abs().max() < 4.5 / 4000**0.5


def test_normal_has_standard_normal_moments_within_and_across_samples():
    draws = Draws(seed=5)
    for z in (draws.normal("x", 0, [0], (N,)), draws.normal("x", 0, range(N), ())):
        z = z.double()
        assert z.dtype == torch.float64
        assert abs(z.mean()) < 4 / N**0.5
        assert abs(z.var() - 1) < 4 * (2 / N) ** 0.5
        assert abs((z**3).mean()) < 4 * (15 / N) ** 0.5
        assert abs((z**4).mean() - 3) < 4 * (96 / N) ** 0.5


def test_uniform_and_integers_have_their_bounds_and_moments():
    draws = Draws(seed=5)
    u = draws.uniform("x", 0, range(N))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / N) ** 0.5
    k = draws.integers("x", 0, range(N), 3, 7)
    assert k.dtype == torch.int64
    counts = torch.bincount(k, minlength=8)
    assert counts[:3].sum() == 0
    assert counts[7] == 0
    assert (counts[3:7] - N / 4).abs().max() < 4 * (N * 3 / 16) ** 0.5


def test_shared_integer_varies_with_the_step_and_stays_in_range():
    values = [Draws(seed=0).shared_integer("k", step, 0, 4) for step in range(400)]
    assert sorted(set(values)) == [0, 1, 2, 3]
    assert values == [Draws(seed=0).shared_integer("k", step, 0, 4) for step in range(400)]


def test_permutation_holds_each_number_once_and_varies_with_the_step():
    first, second = (Draws(seed=0).permutation("shards", step, 50) for step in (0, 1))
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()


def test_global_generators_are_neither_read_nor_moved():
    draws = Draws(seed=0)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    before = draws.normal("x", 0, range(3), (4,))
    draws.uniform("x", 0, range(3))
    draws.permutation("x", 0, 9)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    np.random.seed(99)
    try:
        assert torch.equal(draws.normal("x", 0, range(3), (4,)), before)
    finally:
        torch.set_rng_state(states[0])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda d: d.uniform("x", -1, [0]), ValueError),
        (lambda d: d.uniform("x", 0, [0, -2]), ValueError),
        (lambda d: d.uniform("x", 0, [[0]]), ValueError),
        (lambda d: d.uniform("x", 0, [0.5]), TypeError),
        (lambda d: d.integers("x", 0, [0], 3, 3), ValueError),
        (lambda d: Draws(seed=1.0), TypeError),
    ],
)
def test_wrong_arguments_are_refused(call, error):
    with pytest.raises(error):
        call(Draws(seed=0))
