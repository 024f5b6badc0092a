"""The critic's trainer: answers queries with the critic as it stands, and takes its optimiser steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshot, prefixed, unprefixed
from raydistill.diffusion.shards import Rows
from raydistill.methods.method import Losses, Query
from raydistill.models.critic import Critic
from raydistill.models.denoiser import frozen_weights, state_for_saving
from raydistill.models.pipeline import Pipeline
from raydistill.roles.adapters import adapter_state, whole_weights
from raydistill.roles.optimizer import OptimizerConfig, RoleOptimizer, mean_scalars
from raydistill.roles.sharding import load_held, state_rows
from raydistill.roles.world import World


@dataclass(frozen=True, kw_only=True)
class CriticConfig(OptimizerConfig):
    """Optimiser of the critic and its GAN head."""


class CriticTrainer:
    """Owns the critic, its head and their optimiser."""

    def __init__(self, critic: Critic, config: CriticConfig, world: World, total_steps: int):
        self.critic = critic.train()
        self.optimizer = RoleOptimizer("critic", critic, config, world, total_steps)
        self._scalars: list[dict[str, Tensor]] = []

    def answer(self, query: Query) -> Tensor:
        """x0 [B, C, H, W], logit [B] or logit map [B, h, w]; gradients reach `query.x_t` if it wants one, never the
        critic's weights."""
        x_t, t, cond = query.x_t, query.t, query.cond
        with torch.set_grad_enabled(x_t.requires_grad), frozen_weights(self.critic):
            if query.want == "x0":
                return self.critic(x_t, t, cond, query.guidance_scale)
            if query.want == "logit":
                return self.critic.logits(x_t, t, cond)
            if query.want == "logit_map":
                return self.critic.logit_map(x_t, t, cond)
            raise ValueError(f"this critic answers x0, logit and logit_map, not {query.want}")

    def backward(self, losses: Losses, num_micro_batches: int) -> None:
        """Accumulate one micro-batch's gradient."""
        (losses.total() / num_micro_batches).backward()
        total = {"loss/critic_total": losses.total()}
        self._scalars.append(
            {f"loss/{name}": term for name, term in losses.terms.items()} | total | losses.scalars
        )

    def step(self, *, gan_stage: bool) -> dict[str, float]:
        """One optimiser step on what was accumulated; raises TrainingError if it is not finite."""
        scalars = mean_scalars(self._scalars)
        self._scalars = []
        return self.optimizer.step(scalars, gan_stage=gan_stage)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON state) of a snapshot's part; of sharded tensors this rank's `rows`."""
        tensors, state = self.optimizer.save()
        state |= adapter_state(self.optimizer.config)
        return prefixed(state_for_saving(self.critic), "weights/") | tensors, state

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """What `save` returned."""
        load_held(self.critic, unprefixed(tensors, "weights/"))
        self.optimizer.load(tensors, state)

    def rows(self) -> dict[str, Rows]:
        """Which rows this rank holds of the sharded tensors among those that `save` returns."""
        rows = state_rows(self.critic, self.optimizer.world)
        return {f"weights/{name}": each for name, each in rows.items()} | self.optimizer.rows()


def critic_weights(snapshot: Snapshot, teacher: Callable[[], Pipeline]) -> dict[str, Tensor]:
    """A snapshot's critic by the names of its denoiser, as `generator_weights`; its GAN head left out."""
    prefix = "weights/denoiser."
    tensors, state = snapshot.part("critic", prefix=prefix)
    return whole_weights(snapshot, unprefixed(tensors, prefix), state, teacher)
