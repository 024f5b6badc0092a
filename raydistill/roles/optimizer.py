"""One role's optimiser step: average gradients, check, clip, step, with one host synchronisation for all scalars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydistill.checkpoint import pack_optimizer, prefixed, unpack_optimizer, unprefixed
from raydistill.diffusion.shards import Rows, held, is_sharded, rows_of
from raydistill.errors import ConfigError, TrainingError
from raydistill.models.lora import Lora, LoraTargets
from raydistill.roles.compact_adam import CompactAdamW
from raydistill.roles.world import World


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as all published DMD2 configurations have it (methods.md 1.6)."""

    lr: float = 1e-5
    """Learning rate after warm-up (SD1.5 stage 1: 1e-5; SDXL: 5e-7)."""
    lr_gan_stage: float | None = None
    """Learning rate from method.gan_start_update on (SD1.5 stage 2: 5e-7); none keeps lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 500
    """Optimiser steps of this role over which the learning rate rises linearly."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """After warm-up: constant, as DMD2 does, or falling linearly to 0 at the run's last step (train.generator_updates,
    which a resumed run then can't change)."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision of Adam's moments; bf16, rounded stochastically, halves their memory and takes longer."""
    clip_norm: float | None = 10.0
    """Largest gradient norm; larger gradients are scaled down. none: never (SiD)."""
    lora_rank: int = 0
    """Rank r of low-rank adapters (LoRA, arXiv:2106.09685) that are trained instead of the network: generator and
    critic that have them share one frozen network with the teacher, in teacher.dtype. DMD2's SDXL: 64. 0: all weights
    are trained, in fp32."""
    lora_alpha: float | None = None
    """alpha: adapters count alpha / r times (DMD2's SDXL: 8, with lr 5e-5). none: alpha = r."""
    lora_targets: LoraTargets = "attention"
    """Layers that adapters go into: attention (its projections), or all (feed-forward layers and convolutions too, as
    LCM-LoRA and DMD2's SDXL)."""

    @property
    def lora(self) -> Lora | None:
        """The adapter's shape, None where all weights are trained."""
        if not self.lora_rank:
            return None
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora_rank, float(alpha), self.lora_targets)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"generator.lr and critic.lr must be positive, got {self.lr}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"generator.clip_norm and critic.clip_norm must be positive or none, got {self.clip_norm}"
            )
        if self.lr_gan_stage is not None and not self.lr_gan_stage > 0:
            raise ConfigError(
                f"generator.lr_gan_stage and critic.lr_gan_stage must be positive or none, got {self.lr_gan_stage}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"generator.betas and critic.betas must be at least 0 and below 1, got {self.betas}"
            )
        if self.warmup_steps < 0:
            raise ConfigError(
                f"generator.warmup_steps and critic.warmup_steps must not be negative, got {self.warmup_steps}"
            )


class RoleOptimizer:
    """AdamW over one role's weights; gradients are accumulated by the caller and consumed by `step`.

    Of sharded weights it moves this rank's rows, as plain tensors in the weights' own memory: each rank then works as
    on a smaller network of its own, and optimisers meet no distributed tensors.
    """

    def __init__(self, role: str, module: nn.Module, config: OptimizerConfig, world: World, total_steps: int):
        """total_steps: of this role in the whole run, at which a linear schedule ends."""
        self.role = role
        self.advice = f"lower {role}.lr, now {config.lr}, or use train.dtype=fp32"
        """What may help where figures are not finite."""
        self.total_steps = total_steps
        self.config = config
        self.world = world
        self.steps = 0
        self.clipped_steps = 0
        self._weights = [p for p in module.parameters() if p.requires_grad]
        self._held = [nn.Parameter(held(p.detach())) if is_sharded(p) else p for p in self._weights]
        """What the optimiser moves of each."""
        adam_w: dict[str, Any] = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        self.optimizer: torch.optim.Optimizer
        if config.moments == "bf16":
            self.optimizer = CompactAdamW(self._held, **adam_w)
        else:
            fused = all(p.is_floating_point() for p in self._weights)
            self.optimizer = torch.optim.AdamW(self._held, **adam_w, fused=fused)

    def lr(self, gan_stage: bool) -> float:
        base = (
            self.config.lr_gan_stage if gan_stage and self.config.lr_gan_stage is not None else self.config.lr
        )
        if self.config.warmup_steps:
            base *= min(1.0, (self.steps + 1) / self.config.warmup_steps)
        if self.config.lr_schedule == "linear":
            base *= 1.0 - self.steps / self.total_steps
        return base

    def averaged(self, scalars: dict[str, Tensor]) -> tuple[list[nn.Parameter], Tensor, dict[str, float]]:
        """Average the accumulated gradients and the scalars over the ranks: what this rank holds of the weights that
        have gradients, the gradients' norm, and the scalars with it.

        Raises TrainingError, the gradients then being dropped, if a scalar or the gradient is not finite.
        """
        whole: list[Tensor] = []
        rows: list[Tensor] = []
        for weight, mine in zip(self._weights, self._held, strict=True):
            if weight.grad is None:
                continue
            if mine is weight:
                whole.append(weight.grad)
            else:  # the backward pass has averaged it
                mine.grad = held(weight.grad)
                rows.append(mine.grad)
        self.world.mean_(whole)
        norm = self._norm(whole, rows)
        weights = [p for p in self._held if p.grad is not None]
        names = [*scalars, f"grad_norm/{self.role}"]
        packed = torch.stack([value.detach().float() for value in (*scalars.values(), norm)])
        # a mean over the batch has, per sample, 1/size of the gradient that each rank saw
        squared = torch.tensor([name in scalars and name.startswith(AT_SAMPLES) for name in names])
        packed = torch.where(squared.to(packed.device), packed.square() / self.world.size, packed)
        self.world.mean_([packed])
        packed = torch.where(squared.to(packed.device), packed.sqrt(), packed)
        if LARGEST in scalars:
            largest = scalars[LARGEST].detach().float().clone()
            self.world.max_(largest)
            packed[names.index(LARGEST)] = largest
        values = dict(zip(names, packed.tolist(), strict=True))  # the step's one host synchronisation
        self._require_finite(values)
        return weights, norm, values

    def step(self, scalars: dict[str, Tensor], *, gan_stage: bool) -> dict[str, float]:
        """Take one optimiser step and return the scalars, averaged over the ranks, with the gradient norm.

        Raises TrainingError, before anything moved, if a scalar or the gradient is not finite.
        """
        weights, norm, values = self.averaged(scalars)
        clip_norm = self.config.clip_norm
        if clip_norm is not None and values[f"grad_norm/{self.role}"] > clip_norm:
            self.clipped_steps += 1
            torch.nn.utils.clip_grads_with_norm_(weights, clip_norm, norm)
        lr = self.lr(gan_stage)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.zero_grad()
        self.steps += 1
        return values | {f"lr/{self.role}": lr, f"clipped_steps/{self.role}": float(self.clipped_steps)}

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON state): Adam's moments, of sharded weights those of this rank's rows, and the counters."""
        tensors, state = pack_optimizer(self.optimizer)
        state["shapes"] = self._shapes
        counters = {"steps": self.steps, "clipped_steps": self.clipped_steps}
        return prefixed(tensors, "optimizer/"), {"optimizer": state, **counters}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """What `save` returned, other tensors may lie beside it."""
        unpack_optimizer(self.optimizer, unprefixed(tensors, "optimizer/"), state["optimizer"], self._shapes)
        self.steps = state["steps"]
        self.clipped_steps = state["clipped_steps"]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for weight in (*self._weights, *self._held):
            weight.grad = None

    def rows(self) -> dict[str, Rows]:
        """Which rows this rank holds of the sharded tensors among those that `save` returns."""
        return {
            f"optimizer/{index}.{moment}": rows_of(weight, self.world.rank, self.world.size)
            for index, weight in enumerate(self._weights)
            if is_sharded(weight)
            for moment in ("exp_avg", "exp_avg_sq")
        }

    @property
    def _shapes(self) -> list[list[list[int]]]:
        """Of the weights as a whole, by parameter group."""
        return [[list(weight.shape) for weight in self._weights]]

    def _norm(self, whole: list[Tensor], rows: list[Tensor]) -> Tensor:
        """Of all gradients: of those that every rank has whole, and those of which each has other rows."""
        norm = torch.nn.utils.get_total_norm(whole)
        if not rows:
            return norm
        squared = torch.nn.utils.get_total_norm(rows).square()
        self.world.sum_(squared)
        return (norm.square() + squared).sqrt()

    def _require_finite(self, values: dict[str, float]) -> None:
        bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self.zero_grad()
            raise TrainingError(
                f"{self.role} step {self.steps} stopped before the weights moved: non-finite {', '.join(bad)} "
                f"({self.advice})"
            )


LARGEST = "sample/absmax"
"""The one scalar of which micro-batches and ranks keep the maximum."""
AT_SAMPLES = "grad_norm/"
"""Begins the names of norms of gradients at the samples, which are those of the global batch's mean loss."""


def mean_scalars(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge named scalars of micro-batches: means, but the maximum of LARGEST and joint norms at samples."""
    rows = list(parts)
    merged = {}
    for name in rows[0]:
        stacked = torch.stack([row[name].detach().float() for row in rows])
        if name == LARGEST:
            merged[name] = stacked.amax()
        elif name.startswith(AT_SAMPLES):
            merged[name] = stacked.norm() / len(rows)
        else:
            merged[name] = stacked.mean()
    return merged
