"""The generator's trainer: samples, takes gradients at the samples, steps, keeps the EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshot, prefixed, unprefixed
from raydistill.diffusion.ema import EMA
from raydistill.diffusion.shards import Rows
from raydistill.errors import ConfigError
from raydistill.methods.method import Losses, Method, PhaseDraws, RealBatch
from raydistill.models.denoiser import Cond, Denoiser, state_for_saving
from raydistill.models.pipeline import Pipeline
from raydistill.roles.adapters import SCALE, adapter_state, whole_weights
from raydistill.roles.optimizer import AT_SAMPLES, OptimizerConfig, RoleOptimizer, mean_scalars
from raydistill.roles.sharding import load_held, state_rows
from raydistill.roles.world import World

Weights = Literal["raw", "ema"]
_PREFIX: dict[Weights, str] = {"raw": "weights/", "ema": "ema/"}


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(OptimizerConfig):
    """Optimiser and EMA of the generator."""

    ema_halflife_images: float = 0.0
    """Half-life of the weights' EMA in images, train.batch_size for each generator update; 0 keeps none (DMD2's
    official code has none)."""
    ema_ramp: float | None = None
    """Bound of the half-life early in the run, as a share of the images so far: 0.05 in EDM's and SiD's code
    (arXiv:2206.00364, arXiv:2404.04057). none: no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_halflife_images < 0:
            raise ConfigError(
                f"generator.ema_halflife_images={self.ema_halflife_images} must not be negative; 0 keeps no EMA"
            )
        if self.ema_ramp is not None and not self.ema_ramp > 0:
            raise ConfigError(f"generator.ema_ramp={self.ema_ramp} must be positive, or none")


class GeneratorTrainer:
    """Owns the generator, its optimiser and its EMA."""

    def __init__(self, denoiser: Denoiser, config: GeneratorConfig, world: World, total_steps: int):
        self.denoiser = denoiser.train()
        self.optimizer = RoleOptimizer("generator", denoiser, config, world, total_steps)
        self.ema: EMA | None = None
        if config.ema_halflife_images > 0:
            self.ema = EMA(denoiser, config.ema_halflife_images, config.ema_ramp)
        self._scalars: list[dict[str, Tensor]] = []

    def sample(
        self,
        method: Method,
        cond: Cond,
        shape: Sequence[int],
        real: RealBatch | None,
        draws: PhaseDraws,
        grad: bool,
    ) -> Tensor:
        """Generated samples x [B, *shape], with their graph if `grad`."""
        x_in, t_in = method.generator_input(self.denoiser, cond, shape, real, draws)
        with torch.set_grad_enabled(grad):
            return self.denoiser(x_in, t_in, cond)

    def backward(
        self,
        x: Tensor,
        leaf: Tensor,
        losses: Losses,
        num_micro_batches: int,
        others_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Accumulate one micro-batch's gradient, term by term at the samples and once through the generator.

        x: samples with their graph; leaf: the same values, on which the losses were computed. others_done: called
        between the two, when no other network's graph is needed any more.
        """
        field = torch.zeros_like(leaf)
        norms = {}
        for name, term in losses.terms.items():
            (gradient,) = torch.autograd.grad(term, leaf, retain_graph=True)
            # in one order of summing, however the network that it came through lays out its channels
            norms[f"{AT_SAMPLES}{name}"] = gradient.contiguous().norm()
            field += gradient
        others_done()
        x.backward(field / num_micro_batches)
        total = {"loss/generator_total": losses.total()}
        terms = {f"loss/{name}": term for name, term in losses.terms.items()}
        self._scalars.append(terms | total | norms | losses.scalars | _sample_scalars(leaf.detach()))

    def step(self, images: int, *, gan_stage: bool) -> dict[str, float]:
        """One optimiser step; images: samples of the global batch, by which the EMA is counted."""
        scalars = mean_scalars(self._scalars)
        self._scalars = []
        values = self.optimizer.step(scalars, gan_stage=gan_stage)
        if self.ema is not None:
            self.ema.update(images)
        return _with_std(values)

    def rest(self) -> dict[str, float]:
        """Forget what was accumulated, without a step; the scalars of one. Raises TrainingError as `step` does."""
        scalars, self._scalars = mean_scalars(self._scalars), []
        _, _, values = self.optimizer.averaged(scalars)
        self.optimizer.zero_grad()
        return _with_std(values)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON state) of a snapshot's part; of sharded tensors this rank's `rows`."""
        tensors, state = self.optimizer.save()
        state |= adapter_state(self.optimizer.config)
        tensors |= prefixed(state_for_saving(self.denoiser), _PREFIX["raw"])
        if self.ema is not None:
            tensors |= prefixed(self.ema.weights(), _PREFIX["ema"])
            state["ema_images_seen"] = self.ema.images_seen
        return tensors, state

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """What `save` returned."""
        load_held(self.denoiser, unprefixed(tensors, _PREFIX["raw"]))
        self.optimizer.load(tensors, state)
        if self.ema is not None:
            self.ema.load(unprefixed(tensors, _PREFIX["ema"]), state["ema_images_seen"])

    def rows(self) -> dict[str, Rows]:
        """Which rows this rank holds of the sharded tensors among those that `save` returns."""
        rows = state_rows(self.denoiser, self.optimizer.world)
        named = {prefix + name: each for prefix in _PREFIX.values() for name, each in rows.items()}
        return named | self.optimizer.rows()


def _sample_scalars(x: Tensor) -> dict[str, Tensor]:
    return {"sample/mean": x.mean(), "sample/mean_square": x.square().mean(), "sample/absmax": x.abs().amax()}


def _with_std(values: dict[str, float]) -> dict[str, float]:
    """Means merge over micro-batches and ranks, standard deviations don't: made of the merged means."""
    variance = values.pop("sample/mean_square") - values["sample/mean"] ** 2
    return values | {"sample/std": math.sqrt(max(variance, 0.0))}


def generator_weights(
    snapshot: Snapshot, weights: Weights, teacher: Callable[[], Pipeline]
) -> dict[str, Tensor]:
    """A snapshot's generator by the names of its denoiser, as trained or its EMA; an adapter merged into the teacher.

    teacher: makes the pipeline as it is loaded, asked only where there is an adapter. Raises CheckpointError if the
    adapter belongs to another one.
    """
    tensors, state = snapshot.part("generator", prefix=_PREFIX[weights])
    return whole_weights(snapshot, unprefixed(tensors, _PREFIX[weights]), state, teacher)


def generator_adapter(snapshot: Snapshot, weights: Weights) -> tuple[dict[str, Tensor], float] | None:
    """A snapshot's generator as its adapter and the adapter's scale, None where it has none."""
    tensors, state = snapshot.part("generator", prefix=_PREFIX[weights])
    scale = state.get(SCALE)
    return None if scale is None else (unprefixed(tensors, _PREFIX[weights]), scale)
