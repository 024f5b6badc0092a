"""Windows of the simulated schedules against chains added up by hand; test_apart.py has those of a free network."""

import time
from dataclasses import replace
from typing import Any

import pytest

from raydistill.roles import world
from raydistill.runtime.simulate import Layout, Network, RoleSeconds, Sizes, simulate

SECONDS = RoleSeconds(
    generator_update=0.2, sample=0.1, critic_answer=0.1, critic_update=0.3, teacher_answer=0.4
)
ONE_OF_EACH = Layout("disaggregated", 1, 1, 1)


def window(r: int, layout: Layout, network: Network | None = None, **sizes: Any) -> float:
    return simulate(SECONDS, r, layout, network, Sizes(**sizes)).window_s


def test_latency_is_paid_four_times_where_the_critic_is_the_longest_chain() -> None:
    # answers there, release back, the window's figures there, go back; its samples wait for it already
    for r in (5, 10):
        assert window(r, ONE_OF_EACH, Network(0.01)) == pytest.approx(0.1 + r * 0.3 + 4 * 0.01)
    # the gradient through a GAN's answers is asked for and comes back before the release
    gan = window(5, ONE_OF_EACH, Network(0.01), answer_gradient=1e-9)
    assert gan == pytest.approx(0.1 + 5 * 0.3 + 6 * 0.01)
    assert window(1, replace(ONE_OF_EACH, max_staleness=1), Network(0.01)) == pytest.approx(
        0.2 + 0.1 + 0.4 + 2 * 0.01
    )


def test_latency_is_paid_twice_where_workers_wait_for_their_teacher() -> None:
    slow = replace(SECONDS, teacher_answer=10.0)
    found = simulate(slow, 5, Layout("teachers", 1, 0, 1), Network(0.01))
    assert found.window_s == pytest.approx(10.0 + 0.2 + 0.1 + 2 * 0.01)
    other = simulate(slow, 5, Layout("teachers", 1, 0, 1), Network(0.01), teacher_network=Network(0.5))
    assert other.window_s == pytest.approx(10.0 + 0.2 + 0.1 + 2 * 0.5)


def test_samples_on_a_slow_link_are_the_longest_chain() -> None:
    # update, sample, 1 s there, answer, 1 s back
    assert window(1, ONE_OF_EACH, Network(0.0, 8.0), batch=8.0) == pytest.approx(0.2 + 0.1 + 1.0 + 0.1 + 1.0)
    # a batch after the other through the one link of each generator rank: R of them, however fast all else is
    fast = RoleSeconds(*(1e-6,) * 5)
    found = simulate(fast, 5, replace(ONE_OF_EACH, max_staleness=1), Network(0.0, 8.0), Sizes(batch=8.0))
    assert found.window_s == pytest.approx(5.0, rel=1e-3)
    # two generator ranks send to one critic, whose link takes the whole batch
    two = simulate(
        fast, 5, Layout("disaggregated", 2, 1, 1, max_staleness=1), Network(0.0, 8.0), Sizes(batch=8.0)
    )
    assert two.window_s == pytest.approx(5.0, rel=1e-3)
    both = Layout("disaggregated", 2, 2, 1, max_staleness=1)
    assert simulate(fast, 5, both, Network(0.0, 8.0), Sizes(batch=8.0)).window_s == pytest.approx(
        2.5, rel=1e-3
    )


def test_queries_on_a_slow_link_set_the_pace_of_a_replica() -> None:
    fast = RoleSeconds(*(1e-6,) * 5)
    layout = Layout("teachers", 4, 0, 1)
    found = simulate(fast, 1, layout, Network(0.0, 8.0), Sizes(batch=8.0, query=32.0))
    # the first query of four arrives, the replica takes four in, the last answer goes back
    assert found.window_s == pytest.approx(1.0 + 4.0 + 0.25, rel=1e-3)


def test_gradients_are_averaged_by_a_ring_bucket_by_bucket() -> None:
    network = Network(1e-3, 1e9)
    eight = Layout("colocated", 8)
    free = SECONDS.window(5) / 8
    assert window(5, eight) == pytest.approx(free)
    ring = window(5, eight, network, generator_gradient=4e6, critic_gradient=8e6)
    assert ring - free == pytest.approx(14 * (1e-3 + 0.5e-3) + 5 * 14 * (1e-3 + 1e-3))
    # three buckets send the same bytes and start three times
    three = window(5, eight, network, generator_gradient=4e6, bucket=1.5e6)
    assert three - free == pytest.approx(14 * (3 * 1e-3 + 0.5e-3))
    assert Sizes().bucket == world._BUCKET_BYTES
    assert window(5, Layout("colocated"), network, generator_gradient=4e6) == pytest.approx(SECONDS.window(5))


def test_an_optimiser_step_does_not_shrink_with_the_ranks() -> None:
    stepping = replace(SECONDS, generator_step=0.05, critic_step=0.02)
    assert stepping.window(5) == SECONDS.window(5)
    four = simulate(stepping, 5, Layout("colocated", 4)).window_s
    assert four == pytest.approx((SECONDS.window(5) - 0.05 - 5 * 0.02) / 4 + 0.05 + 5 * 0.02)
    critic = replace(stepping, generator_update=0.0, generator_step=0.0, sample=0.0, teacher_answer=0.0)
    found = simulate(critic, 5, Layout("disaggregated", 2, 4, 8))
    assert found.window_s == pytest.approx((0.1 + 5 * 0.28) / 4 + 5 * 0.02)


@pytest.mark.parametrize(
    ("generators", "teachers", "rounds"), [(4, 1, 4), (4, 2, 2), (4, 3, 2), (4, 4, 1), (4, 9, 1), (5, 2, 3)]
)
def test_replicas_serve_every_rank_in_rounds(generators: int, teachers: int, rounds: int) -> None:
    slow = RoleSeconds(0.2, 0.1, 0.1, 0.3, teacher_answer=100.0)
    found = simulate(slow, 1, Layout("teachers", generators, 0, teachers))
    assert found.window_s == pytest.approx((0.2 + 0.1 + rounds * 100.0) / generators)


ASKS = replace(SECONDS, teacher_for_critic=0.25)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_where_the_critic_learns_first_one_device_does_the_sum_of_its_work(r: int) -> None:
    # one batch of samples more than where it learns from the generator's own
    work = 0.2 + 0.1 + 0.4 + (r + 1) * 0.1 + r * (0.3 + 0.25)
    assert ASKS.window(r, critic_first=True) == pytest.approx(work)
    alone = simulate(ASKS, r, Layout("colocated"), critic_first=True)
    assert alone.window_s == pytest.approx(work)
    assert alone.idle["worker"] == pytest.approx(0.0)
    two = simulate(ASKS, r, Layout("colocated", generators=2), critic_first=True)
    assert two.window_s == pytest.approx(work / 2)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_teachers_hide_behind_a_critic_that_learns_first(r: int) -> None:
    layout = Layout("teachers", teachers=1)
    hidden = simulate(SECONDS, r, layout, critic_first=True)
    # the generator's own samples are made and sent before the critic's
    assert hidden.window_s == pytest.approx(0.1 + max(r * (0.1 + 0.3) + 0.1, 0.4) + 0.2)
    assert hidden.idle["teacher"] == pytest.approx(1 - 0.4 / hidden.window_s)
    slow = replace(SECONDS, teacher_answer=10.0)
    assert simulate(slow, r, layout, critic_first=True).window_s == pytest.approx(0.1 + 10.0 + 0.2)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_a_critic_that_asks_the_teacher_waits_for_its_answer(r: int) -> None:
    # the first critic update's query waits for the replica that has the generator's; the others find it free
    chain = 0.1 + 0.4 + (0.25 + 0.3) + (r - 1) * (0.1 + 0.25 + 0.3) + 0.1 + 0.2
    one = simulate(ASKS, r, Layout("teachers", teachers=1), critic_first=True)
    assert one.window_s == pytest.approx(chain)
    assert one.idle["teacher"] == pytest.approx(1 - (0.4 + r * 0.25) / chain)
    two = simulate(ASKS, r, Layout("teachers", teachers=2), critic_first=True)
    assert two.window_s == pytest.approx(0.1 + r * (0.1 + 0.25 + 0.3) + 0.1 + 0.2)
    # on ranks of their own the critics' samples come in the meantime
    apart = simulate(ASKS, r, Layout("disaggregated", 1, 1, 1), critic_first=True)
    assert apart.window_s == pytest.approx(0.1 + 0.4 + r * (0.25 + 0.3) + 0.1 + 0.2)
    # two critic ranks ask for half a batch each, one after the other of the one replica
    both = simulate(ASKS, r, Layout("disaggregated", 1, 2, 1), critic_first=True)
    assert both.window_s == pytest.approx(0.1 + 0.4 + r * (0.25 + 0.15) + 0.05 + 0.2)
    # every critic update waits for a query's way there and its answer's way back
    far = Network(0.01)
    late = simulate(ASKS, r, Layout("disaggregated", 1, 1, 1), teacher_network=far, critic_first=True)
    assert late.window_s == pytest.approx(apart.window_s + 2 * r * 0.01)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_roles_apart_work_one_after_the_other_where_the_critic_learns_first(r: int) -> None:
    found = simulate(SECONDS, r, ONE_OF_EACH, critic_first=True)
    # two batches of samples until the critic has its first, then its updates, its answers, the generator's update
    chain = 2 * 0.1 + r * 0.3 + 0.1 + 0.2
    assert found.window_s == pytest.approx(chain)
    assert found.idle["generator"] == pytest.approx(1 - (0.2 + (r + 1) * 0.1) / chain)
    assert found.idle["critic"] == pytest.approx(1 - (0.1 + r * 0.3) / chain)
    # samples there and answers back
    far = simulate(SECONDS, r, ONE_OF_EACH, Network(0.01), critic_first=True, teacher_network=Network())
    assert far.window_s == pytest.approx(chain + 2 * 0.01)


@pytest.mark.parametrize("mode", ["colocated", "teachers", "disaggregated"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_better_network_and_more_teachers_never_cost_time(mode: Any, staleness: int) -> None:
    layout = Layout(mode, 8, 4, 2, staleness)
    sizes = {"batch": 1e6, "query": 3e6, "generator_gradient": 1e8, "critic_gradient": 1e8}

    def windows(networks: list[Network]) -> list[float]:
        return [window(5, layout, network, **sizes) for network in networks]

    by_bandwidth = windows([Network(1e-5, 10.0**n) for n in range(6, 12)])
    assert by_bandwidth == sorted(by_bandwidth, reverse=True)
    assert by_bandwidth[0] > 2 * by_bandwidth[-1]
    by_latency = windows([Network(10.0**n, 1e9) for n in range(-6, 0)])
    assert by_latency == sorted(by_latency)
    assert by_latency[-1] > 2 * by_latency[0]
    assert window(5, layout, Network(1e-5, 1e11), **sizes) >= window(5, layout)
    by_teachers = [round(window(5, replace(layout, teachers=n)), 9) for n in (1, 2, 3, 4, 8)]
    assert by_teachers == sorted(by_teachers, reverse=True)


@pytest.mark.parametrize("teachers", [1, 7, 255, 4096])
def test_thousands_of_ranks_take_no_time_to_simulate(teachers: int) -> None:
    sizes = Sizes(batch=64e6, query=128e6, generator_gradient=3.4e9, critic_gradient=3.4e9)
    network = Network(1e-5, 25e9)
    started = time.process_time()
    for layout in (
        Layout("colocated", 4096), Layout("teachers", 4096, 0, teachers),
        Layout("disaggregated", 1365, 2731, teachers, 1),
    ):  # fmt: skip
        found = simulate(replace(SECONDS, teacher_answer=400.0), 5, layout, network, sizes)
        assert found.window_s > 0
        assert all(0 <= share <= 1 for share in found.idle.values())
    assert time.process_time() - started < 3.0
