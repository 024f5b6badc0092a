"""Generator and critic on ranks of their own. Samples travel, weights do not.

    generator rank                                         critic rank
    command of window u, update's answers <--------------- answers and gradients at x_u
    generator update u
    x_{u+1} with graph; teacher queries --> pool
    x_{u+1} ----------------------------------------------> (kept for its turn)
                                                           critic update u.0 on x_u, which it has
    x' for u.1 ... u.(R-1) --------------------------------> critic updates u.1 ... u.(R-1)
                        <---------------------------------- figures of the window

Where the method's critic learns first (SiD, moment matching), a window begins with x' for u.0 ... u.(R-1) and x_u, and
the answers come after the critic's updates.

Conditions, noise levels and noise do not travel: both sides read and draw them, keyed by the same positions. The
critic's answer carries no graph; where the losses differentiate through it, its backward is one more message each way.
With placement.max_staleness=1 the critic answers update u+1 before its window u, and both sides work at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, tee
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill.methods.method import Query, RealBatch
from raydistill.models.denoiser import Cond, Denoiser, frozen_weights
from raydistill.models.pipeline import Pipeline
from raydistill.roles.critic import CriticTrainer
from raydistill.roles.generator import GeneratorTrainer
from raydistill.roles.world import World
from raydistill.runtime.batches import OpenReader, Prompts
from raydistill.runtime.keeper import all_meet_at
from raydistill.runtime.lanes import Expected, Lanes
from raydistill.runtime.ranks import Partition, Transfer, transfers
from raydistill.runtime.session import Session
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.simulate import sampling_order
from raydistill.runtime.trainer import Asked, CriticSide, GeneratorSide, Sampled

_GO, _STOP = range(2)
"""What a generator rank says at the beginning of a window."""
_DONE = -1
"""In place of a query's number: no more backward passes through this piece."""


@dataclass(frozen=True)
class _Piece:
    """Rows of a generator rank's micro-batch that one critic rank answers for; positions of the global batch."""

    transfer: Transfer
    micro: int
    start: int
    stop: int


def pieces(
    all_transfers: Sequence[Transfer], batch_size: int, num_generators: int, micro_batch_size: int
) -> list[_Piece]:
    """Every piece of every generator rank's micro-batches, in the order in which critics serve them."""
    each = batch_size // num_generators
    found = []
    for transfer in all_transfers:
        first = transfer.start // each * each
        for micro in range(each // micro_batch_size):
            low = first + micro * micro_batch_size
            start, stop = max(low, transfer.start), min(low + micro_batch_size, transfer.stop)
            if start < stop:
                found.append(_Piece(transfer, micro, start, stop))
    return sorted(found, key=lambda piece: (piece.micro, piece.transfer.generator, piece.start))


def is_stale(config: RunConfig, update: int) -> bool:
    """Whether the critic answers this update before its own window before it.

    Not where all ranks meet before it: a run that goes on from a snapshot could not have been answered earlier.
    """
    between = 0 < update < config.train.generator_updates
    return config.placement.max_staleness > 0 and between and not all_meet_at(config, update)


class _Wired:
    """What both sides know of the ranks and of what passes between them."""

    def __init__(self, config: RunConfig, session: Session, ranks: Partition):
        self.ranks = ranks
        self.lanes = Lanes(session.device)
        size, generators = config.train.batch_size, len(ranks.generator)
        shared = transfers(ranks, size)
        self.mine = [t for t in shared if session.world.rank in (t.generator, t.critic)]
        all_pieces = pieces(shared, size, generators, config.train.micro_batch(generators))
        self.pieces = [piece for piece in all_pieces if piece.transfer in self.mine]


class _CriticAnswer:
    """One query of a micro-batch, answered by the critic ranks that hold its samples."""

    def __init__(self, lanes: Lanes, number: int, parts: list[tuple[_Piece, Tensor]]):
        self._lanes = lanes
        self._number = number
        self._parts = parts

    def value(self) -> Tensor:
        return torch.cat([answer for _, answer in self._parts])

    def vjp(self, cotangent: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradient at x_t [B, *shape] of <answer, cotangent>."""
        expected, row = [], 0
        for piece, answer in self._parts:
            critic = piece.transfer.critic
            self._lanes.send_numbers([self._number], critic)
            self._lanes.send(cotangent[row : row + len(answer)], critic)
            expected.append(self._lanes.expect((len(answer), *shape), critic))
            row += len(answer)
        return torch.cat([each.take() for each in expected])


class _Answer(torch.autograd.Function):
    """Forward: the critic's answer. Backward: its vector-Jacobian product, computed where the critic lives."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, answer: _CriticAnswer) -> Tensor:
        ctx.answer, ctx.shape = answer, x_t.shape[1:]
        return answer.value()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return ctx.answer.vjp(cotangents[0], ctx.shape), None


class GeneratorRank(GeneratorSide):
    """A rank that holds the generator only."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        ranks: Partition,
        world: World,
        pipeline: Pipeline | None = None,
        open_reader: OpenReader | None = None,
    ):
        """world: the generator ranks. pipeline, open_reader: instead of those that the settings name."""
        super().__init__(config, session, world, pipeline, open_reader)
        self.build_generator(self.networks("generator"))
        self._wired = _Wired(config, session, ranks)
        self._sent = -1
        """The last update whose samples the critic has."""
        self._owed: list[int] = []
        """Windows whose figures the critic has not sent yet."""

    @property
    def parts(self) -> Mapping[str, GeneratorTrainer | CriticTrainer]:
        return {"generator": self.generator}

    def goes_on(self) -> bool:
        """Whether there is another window; tells the critic ranks."""
        stop = self.session.should_stop(self.world)
        for critic in sorted({transfer.critic for transfer in self._wired.mine}):
            self._wired.lanes.send_numbers([_STOP if stop else _GO], critic)
        if stop:
            self._critic_figures(0)
        return not stop

    def window(self) -> dict[str, float]:
        """One generator update, and the samples of its R critic updates."""
        started = time.perf_counter()
        update, r = self.progress.generator_updates, self.method.critic_updates_per_generator
        self._wired.lanes.begin_window()
        if self.method.critic_first:
            self.ask_ahead(update)
            for k in range(r):
                self._send_fresh(update, k)
        asked = list(self.asked(update))
        if self._sent != update:
            self._send_batch([each.leaf for each in asked])
        waited = 0.0
        for micro, each in enumerate(asked):
            before = time.perf_counter()
            answers = self._critic_answers(micro, each)
            waited += time.perf_counter() - before
            answers |= {name: pending.answer() for name, pending in each.pending.items()}
            self.generator_backward(each, answers, partial(self._release, micro))
        values = self.generator_step(update, gan_stage=self.gan_stage(update))
        for k in () if self.method.critic_first else sampling_order(r):
            if k:
                self._send_fresh(update, k)
            elif ahead := self.ask_ahead(update + 1):
                self._send_batch([each.leaf for each in ahead])
                self._sent = update + 1
        busy = time.perf_counter() - started - waited
        self._owed.append(update)
        values |= self._critic_figures(int(is_stale(self.config, update + 1)))
        values |= self.teacher.figures() | {"time/critic_wait_s": waited, "time/generator_s": busy}
        values |= {"traffic/critic_bytes": float(self._wired.lanes.take_bytes())}
        return values | self.count(time.perf_counter() - started)

    def _release(self, micro: int) -> None:
        """Tell the critic that no backward pass through its answers is to come: it learns while this rank works on."""
        for piece in self._pieces(micro):
            self._wired.lanes.send_numbers([_DONE], piece.transfer.critic)

    def _critic_figures(self, later: int) -> dict[str, float]:
        """The critic's figures of this window, if they are there; those of earlier ones are logged where they belong.

        later: windows whose figures come with a later one.
        """
        values: dict[str, float] = {}
        while len(self._owed) > later:
            update = self._owed.pop(0)
            if self.session.world.rank != 0:
                continue
            values = self._wired.lanes.receive_values(self._wired.ranks.critic[0])
            if update < self.progress.generator_updates:
                if (update + 1) % self.config.train.log_every == 0:
                    self.session.tracker.metrics(values, update + 1)
                values = {}
        return values

    def _send_fresh(self, update: int, k: int) -> None:
        """Samples for the k-th critic update of a window."""
        reals = self.batches.real(self.real_number(update, k), wanted=self.method.starts_from_real)
        step = update * self.method.critic_updates_per_generator + k
        self._send_batch(
            [self.fresh_sample(step, these, next(reals)).x for these in self.fresh_prompts(update, k)]
        )

    def _send_batch(self, micro_batches: Sequence[Tensor]) -> None:
        """This rank's slice of a batch to the critic ranks that hold it."""
        batch = torch.cat([x.detach() for x in micro_batches])
        first = self.world.rank * len(batch)
        for transfer in self._wired.mine:
            self._wired.lanes.send(batch[transfer.start - first : transfer.stop - first], transfer.critic)

    def _pieces(self, micro: int) -> list[_Piece]:
        return [piece for piece in self._wired.pieces if piece.micro == micro]

    def _critic_answers(self, micro: int, asked: Asked) -> dict[str, Tensor]:
        names = [name for name, query in asked.queries.items() if query.network == "critic"]
        expected: list[list[tuple[_Piece, Expected]]] = [[] for _ in names]
        for piece in self._pieces(micro):
            for number, name in enumerate(names):
                query = asked.queries[name]
                shape = answer_shape(query, piece.stop - piece.start, self.generator.denoiser)
                expected[number].append((piece, self._wired.lanes.expect(shape, piece.transfer.critic)))
        answers = {}
        for number, name in enumerate(names):
            query = asked.queries[name]
            answer = _CriticAnswer(
                self._wired.lanes, number, [(piece, each.take()) for piece, each in expected[number]]
            )
            answers[name] = _Answer.apply(query.x_t, answer) if query.x_t.requires_grad else answer.value()  # type: ignore[no-untyped-call]
        return answers


def answer_shape(query: Query, rows: int, denoiser: Denoiser) -> tuple[int, ...]:
    """Shape of an answer of the critic, whose network is shaped as `denoiser`."""
    if query.want == "logit":
        return (rows,)
    if query.want == "logit_map":
        return (rows, *denoiser.feature_shape[1:])
    return (rows, *query.x_t.shape[1:])


class CriticRank(CriticSide):
    """A rank that holds the critic only."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        ranks: Partition,
        world: World,
        pipeline: Pipeline | None = None,
        open_reader: OpenReader | None = None,
    ):
        """world: the critic ranks. pipeline, open_reader: instead of those that the settings name."""
        super().__init__(config, session, world, pipeline, open_reader)
        self.build_critic(self.networks("critic"))
        assert self.elsewhere is not None  # roles apart have their teacher in a pool
        self.teacher = self.elsewhere
        self._wired = _Wired(config, session, ranks)
        self._x: dict[int, Tensor] = {}
        """This rank's slice of the samples of generator updates to come."""
        self._prompts: dict[int, list[Prompts]] = {}
        """The prompts of generator updates that were answered and not learnt from."""
        self._served = -1
        """The last generator update that was answered, """
        self._answered_at = 0
        """and the critic updates done by then."""
        self._stop = False

    @property
    def parts(self) -> Mapping[str, GeneratorTrainer | CriticTrainer]:
        return {"critic": self.critic}

    def goes_on(self) -> bool:
        """Whether there is another window, as the generator ranks say."""
        if not self._stop and self._served < self.progress.generator_updates:
            self._stop = self._told_to_stop()
        return not self._stop

    def window(self) -> dict[str, float]:
        """Answers to one generator update, and R updates of the critic."""
        started = time.perf_counter()
        update, r = self.progress.generator_updates, self.method.critic_updates_per_generator
        gan_stage = self.gan_stage(update)
        self._wired.lanes.begin_window()
        if self.method.critic_first:
            return self._end_window(started, self._critic_first(update, gan_stage=gan_stage))
        if update not in self._x:
            self._x[update] = self._join(self._expect_batch())
        if self._served < update:
            self._serve(update)
        versions = {"version/generator": float(update), "version/critic": float(self._answered_at)}
        last = update + 1 == self.config.train.generator_updates
        # in the order in which they are sent; 0: the samples of the next generator update
        expected = {k: self._expect_batch() for k in sampling_order(r) if k or not last}
        following = expected.get(0)
        if following is not None and is_stale(self.config, update + 1):
            self._stop = self._told_to_stop()
            self._x[update + 1] = self._join(following)
            if not self._stop:
                self._serve(update + 1)
        values: dict[str, float] = {}
        mine = self._x.pop(update)
        for k in range(r):
            prompts = self.fresh_prompts(update, k) if k else iter(self._prompts.pop(update))
            x = self._join(expected[k]) if k else mine
            values |= self._learn(update, k, x, prompts, gan_stage=gan_stage)
        if following is not None and update + 1 not in self._x:
            self._x[update + 1] = self._join(following)
        return self._end_window(started, values | versions)

    def _critic_first(self, update: int, *, gan_stage: bool) -> dict[str, float]:
        """A window in which the generator's update comes last."""
        r = self.method.critic_updates_per_generator
        fresh, own = [self._expect_batch() for _ in range(r)], self._expect_batch()
        values: dict[str, float] = {}
        for k, expected in enumerate(fresh):
            prompts = self.fresh_prompts(update, k)
            values |= self._learn(update, k, self._join(expected), prompts, gan_stage=gan_stage)
        self._x[update] = self._join(own)
        self._serve(update)
        del self._x[update], self._prompts[update]
        return values | {"version/generator": float(update), "version/critic": float(self._answered_at)}

    def _learn(
        self, update: int, k: int, x: Tensor, prompts: Iterator[Prompts], *, gan_stage: bool
    ) -> dict[str, float]:
        """The k-th critic update of a window, on this rank's slice of samples."""
        number = self.real_number(update, k)
        reals, conditions = tee(self.batches.real(number, wanted=self.method.reads_real(update)))
        self.kept = list(self._micro_batches(x, prompts, conditions))
        step = update * self.method.critic_updates_per_generator + k
        return self.critic_update(step, iter(self.kept), reals, gan_stage=gan_stage)

    def _end_window(self, started: float, values: dict[str, float]) -> dict[str, float]:
        values |= {"time/critic_s": time.perf_counter() - started}
        if self.session.world.rank == self._wired.ranks.critic[0]:
            self._wired.lanes.send_values(values, 0)
        return values | self.count(time.perf_counter() - started)

    def _told_to_stop(self) -> bool:
        sources = sorted({transfer.generator for transfer in self._wired.mine})
        commands = [self._wired.lanes.receive_numbers(1, source) for source in sources]
        return [_STOP] in commands

    def _expect_batch(self) -> list[Expected]:
        shape = self.pipeline.latent_shape
        return [
            self._wired.lanes.expect((transfer.stop - transfer.start, *shape), transfer.generator)
            for transfer in self._wired.mine
        ]

    def _join(self, expected: list[Expected]) -> Tensor:
        return torch.cat([each.take() for each in expected])

    def _micro_batches(
        self, x: Tensor, prompts: Iterator[Prompts], reals: Iterator[RealBatch | None]
    ) -> Iterator[Sampled]:
        for part, these in zip(x.split(self.batches.micro_batch_size), prompts, strict=True):
            yield Sampled(part, self._conditions(these, next(reals)))

    def _conditions(self, prompts: Prompts, real: RealBatch | None) -> Prompts:
        """A generator that starts from noised real samples gets their own captions."""
        if real is not None and self.method.starts_from_real:
            return Prompts(real.cond, prompts.positions)
        return prompts

    def _serve(self, update: int) -> None:
        """Answer the generator ranks' queries of an update, and their backward passes through the answers."""
        from_real = self.method.starts_from_real
        reals = self.batches.real(self.real_number(update), wanted=from_real, ahead=True)
        prompts, sources = [], []
        for these in self.batches.prompts("prompt/generator", update):
            real = next(reals)
            prompts.append(self._conditions(these, real))
            sources.append(real.x0 if real is not None and from_real else None)
        self._prompts[update] = prompts
        started_from = torch.cat([x0 for x0 in sources if x0 is not None]) if from_real else None
        cond = Cond.cat([these.cond for these in prompts])
        first = int(prompts[0].positions[0])
        # until the backward passes: checkpointed activations are computed again in them, as the first time
        with frozen_weights(self.critic.critic):
            for _, group in groupby(self._wired.pieces, key=lambda piece: piece.micro):
                served = []
                for piece in group:
                    rows = slice(piece.start - first, piece.stop - first)
                    these = Prompts(
                        Cond({name: tensor[rows] for name, tensor in cond.tensors.items()}),
                        np.arange(piece.start, piece.stop),
                    )
                    leaf = self._x[update][rows].detach().requires_grad_()
                    real = None if started_from is None else RealBatch(started_from[rows], these.cond)
                    draws = self.draws_of("generator", update, these)
                    queries = self.method.queries(leaf, these.cond, real, draws)
                    asked = [query for query in queries.values() if query.network == "critic"]
                    answers = [self.critic.answer(query) for query in asked]
                    for answer in answers:
                        self._wired.lanes.send(answer, piece.transfer.generator)
                    served.append((piece, asked, answers))
                for piece, asked, answers in served:
                    self._backward_passes(piece.transfer.generator, asked, answers)
        self._served, self._answered_at = update, self.critic.optimizer.steps

    def _backward_passes(self, generator: int, asked: list[Query], answers: list[Tensor]) -> None:
        while True:
            (number,) = self._wired.lanes.receive_numbers(1, generator)
            if number == _DONE:
                return
            cotangent = self._wired.lanes.receive(answers[number].shape, generator)
            # several loss terms may share an answer
            (gradient,) = torch.autograd.grad(
                answers[number], asked[number].x_t, cotangent, retain_graph=True
            )
            self._wired.lanes.send(gradient, generator)
