"""What a rank holds and one window of updates on it, where generator and critic share a process.

    window u:   generator update u on batch u of prompts
                R critic updates: the first on the very images of the generator update (made before it moved, as in
                DMD2's published order), the others on fresh ones
    window u of a method whose critic learns first (SiD, moment matching):
                R critic updates on fresh images, then generator update u on others

The generator stands still during the critic updates. So where the teacher lives elsewhere, the samples of the generator
update after them are made and sent to it at their start: it scores while the critic learns, with no staleness.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshot, part_name, sharded_part
from raydistill.diffusion.random import Draws
from raydistill.methods.method import Method, PhaseDraws, Query, RealBatch
from raydistill.models.denoiser import frozen_weights
from raydistill.models.pipeline import Pipeline
from raydistill.roles.critic import CriticTrainer
from raydistill.roles.generator import GeneratorTrainer
from raydistill.roles.preflight import preflight
from raydistill.roles.teacher import Pending, Scorer
from raydistill.roles.world import World
from raydistill.runtime import build
from raydistill.runtime.batches import Batches, OpenReader, Prompts
from raydistill.runtime.session import Session
from raydistill.runtime.settings import RunConfig

_PREFLIGHT_SAMPLES = 64


@dataclass
class Progress:
    """How far the run has come."""

    generator_updates: int = 0
    critic_updates: int = 0
    images: int = 0
    """Samples generated for training, over all ranks."""
    train_s: float = 0.0
    """Seconds spent in updates, over restarts."""


@dataclass(frozen=True)
class Sampled:
    """A micro-batch of generated samples."""

    x: Tensor
    prompts: Prompts


@dataclass(frozen=True)
class Asked:
    """A micro-batch of the generator's phase whose teacher queries are on their way."""

    x: Tensor
    """Samples; without their graph where it is to be made again."""
    leaf: Tensor
    prompts: Prompts
    real: RealBatch | None
    draws: PhaseDraws
    queries: dict[str, Query]
    pending: dict[str, Pending]


class Rank:
    """What every rank has, whatever roles it holds."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        world: World,
        pipeline: Pipeline | None,
        open_reader: OpenReader | None,
    ):
        """world: the ranks of this rank's role. pipeline, open_reader: instead of those that the settings name."""
        self.config = config
        self.session = session
        self.world = world
        self.device = session.device
        self.draws = Draws(config.seed)
        self.pipeline: Pipeline = pipeline or build.build_pipeline(config)
        self.method: Method = build.build_method(config, self.pipeline)
        self.elsewhere: Scorer | None = session.scorer(self.pipeline)
        self.batches = Batches(
            config,
            self.pipeline,
            world,
            session.device,
            real_data=self.method.needs.real_data,
            ahead=self.method.starts_from_real and self.elsewhere is not None,
            open_reader=open_reader,
        )
        self.progress = Progress()
        self.kept: list[Sampled] = []
        """The samples in hand, on which a critic update may fail."""

    def networks(self, *roles: str) -> build.Networks:
        """Those of the trained roles that this rank holds, and the teacher's."""
        elsewhere = self.elsewhere.denoiser if self.elsewhere else None
        return build.build_networks(self.config, self.pipeline, self.device, roles, self.world, elsewhere)

    @property
    def samples_are_older(self) -> bool:
        """Whether the samples in hand can't be made again by the weights as they are now."""
        return True

    @property
    def parts(self) -> Mapping[str, GeneratorTrainer | CriticTrainer]:
        """The roles that this rank holds."""
        raise NotImplementedError

    def goes_on(self) -> bool:
        """Whether there is another window, unless the run is complete; called by all ranks before each."""
        return not self.session.should_stop(self.world)

    def window(self) -> dict[str, float]:
        """One generator update and its R critic updates, as far as this rank takes part; the figures to log."""
        raise NotImplementedError

    def load(self, snapshot: Snapshot) -> None:
        """Take this rank's roles and the counters from a snapshot."""
        for role, owner in self.parts.items():
            owner.load(*snapshot.part(role, owner.rows()))
        self.progress = Progress(**snapshot.manifest["progress"])

    @property
    def sharded(self) -> bool:
        """Whether each rank holds rows of its roles' tensors and writes a part of its own of each snapshot."""
        return self.config.placement.sharding == "fsdp"

    def part_names(self, rank: int) -> list[str]:
        """Of the parts of a snapshot that a rank of this role's world writes."""
        return [part_name(role, rank, self.world.size) if self.sharded else role for role in self.parts]

    def save(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """(tensors, JSON state) of the parts that this rank writes, by their names; the tensors are the live ones."""
        written = {}
        for name, owner in zip(self.part_names(self.world.rank), self.parts.values(), strict=True):
            tensors, state = owner.save()
            written[name] = (
                sharded_part(tensors, state, owner.rows(), self.world.rank)
                if self.sharded
                else (tensors, state)
            )
        return written

    def gan_stage(self, update: int) -> bool:
        return self.method.gan_on(update)

    def real_number(self, update: int, k: int | None = None) -> int:
        """Which real batch goes with the k-th critic update of a window, or with its generator update (None).

        The generator's own update shares the batch of k = 0, which has the same samples, unless the critic goes first.
        """
        r = self.method.critic_updates_per_generator
        if self.method.critic_first and self.method.starts_from_real:
            return update * (r + 1) + (r if k is None else k)
        return update * r + (k or 0)

    def draws_of(self, phase: str, step: int, prompts: Prompts) -> PhaseDraws:
        return PhaseDraws(self.draws, phase, step, prompts.positions, self.device)

    def fresh_prompts(self, update: int, k: int) -> Iterator[Prompts]:
        """Of the k-th critic update of a window; where the generator goes first, k = 0 reads none."""
        r = self.method.critic_updates_per_generator
        number = update * r + k if self.method.critic_first else update * (r - 1) + k - 1
        return self.batches.prompts("prompt/critic", number)

    def count(self, seconds: float) -> dict[str, float]:
        """Count a window; its counters, times and throughput."""
        r = self.method.critic_updates_per_generator
        # a critic that learns first never sees the samples of the generator's own update
        images = self.config.train.batch_size * (r + self.method.critic_first)
        done = self.progress
        done.generator_updates += 1
        done.critic_updates += r
        done.images += images
        done.train_s += seconds
        return {
            "generator_updates": float(done.generator_updates),
            "critic_updates": float(done.critic_updates),
            "images": float(done.images),
            "time/train_s": done.train_s,
            "time/update_s": seconds,
            "time/data_s": self.batches.take_seconds(),
            "throughput/images_per_s": images / seconds,
            "memory/peak_gib": peak_memory_gib(self.device),
        }


class GeneratorSide(Rank):
    """A rank that holds the generator and asks the teacher."""

    generator: GeneratorTrainer
    teacher: Scorer

    def build_generator(self, networks: build.Networks) -> None:
        """The generator and the teacher."""
        self._prediction = self.pipeline.denoiser.prediction
        self.generator = build.build_generator(self.config, self.method, self.world, networks)
        self.teacher = self.elsewhere or build.scorer(self.pipeline, networks.teacher, self.device)
        self.asks_ahead = self.elsewhere is not None
        self._ahead: tuple[int, list[Asked]] | None = None

    def preflight(self) -> dict[str, float]:
        """The teacher's error on real samples by noise level; raises ConfigError if they don't fit each other."""
        real = self.batches.some_real(_PREFLIGHT_SAMPLES)
        report = preflight(self.teacher.denoiser, real.x0, real.cond, self.draws, self._prediction)
        return {f"preflight/error_{level:g}": error for level, error in report.errors.items()}

    def ask_ahead(self, update: int) -> list[Asked]:
        """Ask for the next generator update already, unless it is none of this run."""
        if update < self.config.train.generator_updates:
            self._ahead = update, list(self._ask(update))
        return self._ahead[1] if self._ahead else []

    def asked(self, update: int) -> Iterator[Asked]:
        """The update's micro-batches with their teacher queries; all are asked before the first answer is waited for
        where the teacher is elsewhere, one by one where it is here."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == update:
            return iter(ahead[1])
        return iter(list(self._ask(update))) if self.asks_ahead else self._ask(update)

    def generator_backward(
        self, asked: Asked, answers: Mapping[str, Tensor], others_done: Callable[[], None] = lambda: None
    ) -> Tensor:
        """One micro-batch's losses and gradient; returns its samples without their graph."""
        x = asked.x
        if not x.requires_grad:
            x = self._sample(asked.prompts, asked.real, asked.draws, grad=True)
        losses = self.method.generator_losses(asked.leaf, asked.queries, answers)
        self.generator.backward(x, asked.leaf, losses, self.batches.num_micro_batches, others_done)
        return x.detach()

    def generator_step(self, update: int, *, gan_stage: bool) -> dict[str, float]:
        """The optimiser's step on what was accumulated, unless the generator rests."""
        if self.method.generator_rests(update):
            return self.generator.rest()
        return self.generator.step(self.config.train.batch_size, gan_stage=gan_stage)

    def fresh_sample(self, step: int, prompts: Prompts, real: RealBatch | None) -> Sampled:
        """A micro-batch for the critic update `step`; real: what a generator that starts from real samples noises."""
        if real is not None and self.method.starts_from_real:
            prompts = Prompts(real.cond, prompts.positions)
        return Sampled(
            self._sample(prompts, real, self.draws_of("critic", step, prompts), grad=False), prompts
        )

    def _ask(self, update: int) -> Iterator[Asked]:
        reals = self.batches.real(
            self.real_number(update), wanted=self.method.starts_from_real, ahead=self.asks_ahead
        )
        for prompts in self.batches.prompts("prompt/generator", update):
            yield self._ask_one(update, prompts, next(reals))

    def _ask_one(self, update: int, prompts: Prompts, real: RealBatch | None) -> Asked:
        if real is not None:
            prompts = Prompts(real.cond, prompts.positions)
        draws = self.draws_of("generator", update, prompts)
        # graphs of many micro-batches at once would undo what accumulation saves
        grad = not self.asks_ahead or self.batches.num_micro_batches == 1
        x = self._sample(prompts, real, draws, grad=grad)
        leaf = x.detach().requires_grad_()
        queries = self.method.queries(leaf, prompts.cond, real, draws)
        pending = {
            name: self.teacher.submit(query) for name, query in queries.items() if query.network == "teacher"
        }
        return Asked(x, leaf, prompts, real, draws, queries, pending)

    def _sample(self, prompts: Prompts, real: RealBatch | None, draws: PhaseDraws, *, grad: bool) -> Tensor:
        return self.generator.sample(
            self.method, prompts.cond, self.pipeline.latent_shape, real, draws, grad=grad
        )


class CriticSide(Rank):
    """A rank that holds the critic."""

    critic: CriticTrainer
    teacher: Scorer
    """Who answers the critic's own questions, where the method has any."""

    def build_critic(self, networks: build.Networks) -> None:
        """The critic; its GAN head may read the features of a teacher that lives elsewhere."""
        self.critic = build.build_critic(
            self.config, self.method, self.pipeline, self.world, self.device, networks
        )

    def critic_update(
        self, step: int, samples: Iterator[Sampled], reals: Iterator[RealBatch | None], *, gan_stage: bool
    ) -> dict[str, float]:
        """One optimiser step of the critic on this rank's micro-batches."""
        for sampled in samples:
            draws = self.draws_of("critic", step, sampled.prompts)
            real, cond = next(reals), sampled.prompts.cond
            asked = self.method.critic_queries(sampled.x, cond, real, draws)
            pending = {name: self.teacher.submit(query) for name, query in asked.items()}
            answers = {name: each.answer() for name, each in pending.items()}
            losses = self.method.critic_losses(self.critic.critic, sampled.x, cond, real, draws, answers)
            self.critic.backward(losses, self.batches.num_micro_batches)
        return self.critic.step(gan_stage=gan_stage)


class Trainer(GeneratorSide, CriticSide):
    """Generator and critic in one process, the teacher in it or behind a service."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        pipeline: Pipeline | None = None,
        open_reader: OpenReader | None = None,
    ):
        """pipeline, open_reader: instead of those that the settings name."""
        super().__init__(config, session, session.world, pipeline, open_reader)
        networks = self.networks("critic", "generator")
        self.build_critic(networks)
        self.build_generator(networks)
        self._sampled_at = 0
        """The generator's optimiser steps when the samples in hand were made."""

    @property
    def parts(self) -> Mapping[str, GeneratorTrainer | CriticTrainer]:
        return {"generator": self.generator, "critic": self.critic}

    @property
    def samples_are_older(self) -> bool:
        return self.generator.optimizer.steps > self._sampled_at

    def window(self) -> dict[str, float]:
        """One generator update and its R critic updates; returns the figures to log."""
        started = time.perf_counter()
        update = self.progress.generator_updates
        gan_stage = self.gan_stage(update)
        if self.method.critic_first:
            if self.asks_ahead:
                self.ask_ahead(update)
            values = self._critic_updates(update, gan_stage=gan_stage)
            values |= self.generator_update(update, gan_stage=gan_stage)
            self.kept = []
        else:
            values = self.generator_update(update, gan_stage=gan_stage)
            if self.asks_ahead:
                self.ask_ahead(update + 1)
            values |= self._critic_updates(update, gan_stage=gan_stage)
        return values | self.teacher.figures() | self.count(time.perf_counter() - started)

    def _critic_updates(self, update: int, *, gan_stage: bool) -> dict[str, float]:
        """The window's R critic updates; the figures of the last."""
        values: dict[str, float] = {}
        r = self.method.critic_updates_per_generator
        wanted = self.method.reads_real(update)
        for k in range(r):
            step = update * r + k
            # each real micro-batch serves the sample, where that starts from it, and the critic's losses
            sources, reals = tee(self.batches.real(self.real_number(update, k), wanted=wanted))
            samples = iter(self.kept)
            if k or self.method.critic_first:
                samples = (
                    self.fresh_sample(step, prompts, next(sources))
                    for prompts in self.fresh_prompts(update, k)
                )
            values |= self.critic_update(step, samples, reals, gan_stage=gan_stage)
        return values

    def generator_update(self, update: int, *, gan_stage: bool) -> dict[str, float]:
        """One optimiser step of the generator; its samples are kept for the critic."""
        # frozen until the backward pass is over: checkpointed activations are recomputed in it
        with frozen_weights(self.critic.critic):
            self.kept, self._sampled_at = [], self.generator.optimizer.steps
            for asked in self.asked(update):
                answers = {
                    name: asked.pending[name].answer() if name in asked.pending else self.critic.answer(query)
                    for name, query in asked.queries.items()
                }
                self.kept.append(Sampled(self.generator_backward(asked, answers), asked.prompts))
        return self.generator_step(update, gan_stage=gan_stage)


def peak_memory_gib(device: torch.device) -> float:
    """Of this process so far: on a GPU what torch allocated, else all of its memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
