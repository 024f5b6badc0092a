"""A critic that is the teacher one infinitesimal step away: moment matching in the space of parameters.

Salimans et al., arXiv:2406.04103, algorithm 3. Its weights are the teacher's and never move. An update turns the
gradient of its losses into a direction nu = -Lambda grad; a "tangent" query is then answered with J_theta(z_s) nu, the
change of x0 along it, by forward-mode differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raydistill.checkpoint import prefixed, unprefixed
from raydistill.errors import CheckpointError, ConfigError
from raydistill.methods.method import Query
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Denoiser, frozen_weights
from raydistill.roles.critic import CriticConfig, CriticTrainer
from raydistill.roles.optimizer import RoleOptimizer
from raydistill.roles.world import World

Preconditioner = Literal["identity", "adam"]


class InstantOptimizer(RoleOptimizer):
    """Keeps the preconditioned descent direction of the accumulated gradients instead of taking a step along it.

    Lambda is 1, or 1 / (sqrt(v) + eps) with v the bias-corrected running second moment of these gradients (`betas[1]`,
    `eps`). The paper's Lambda comes from the teacher's training (unverified, methods.md 3.3); v stands in for it.
    """

    def __init__(self, module: nn.Module, config: CriticConfig, world: World, preconditioner: Preconditioner):
        super().__init__("critic", module, config, world, total_steps=1)
        self.advice = "lower generator.lr, or use train.dtype=fp32"
        self.direction: dict[str, Tensor] = {}
        """nu by the names of the weights."""
        self._module = module
        self._preconditioner = preconditioner
        self._second_moments: dict[str, Tensor] = {}

    def step(self, scalars: dict[str, Tensor], *, gan_stage: bool) -> dict[str, float]:
        """Turn the accumulated gradients into the direction; scalars and errors as of `RoleOptimizer.step`."""
        _, _, values = self.averaged(scalars)
        self.steps += 1
        self.direction = {}
        for name, weight in self._module.named_parameters():
            if weight.grad is not None:
                self.direction[name] = -self._preconditioned(name, weight.grad)
        self.zero_grad()
        return values

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON state): nu, second moments and the counter."""
        tensors = prefixed(self.direction, "nu/") | prefixed(self._second_moments, "second_moment/")
        return tensors, {"preconditioner": self._preconditioner, "steps": self.steps}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """What `save` returned. Raises CheckpointError where it was saved with another preconditioner."""
        saved = state.get("preconditioner")
        if saved != self._preconditioner:
            raise CheckpointError(
                f"the snapshot's critic has preconditioner {saved}, this run's {self._preconditioner} "
                "(method.variant, method.preconditioner)"
            )
        like = dict(self._module.named_parameters())
        self.direction, self._second_moments = (
            {
                name: torch.empty_like(like[name]).copy_(part)
                for name, part in unprefixed(tensors, prefix).items()
            }
            for prefix in ("nu/", "second_moment/")
        )
        self.steps = state["steps"]

    def _preconditioned(self, name: str, gradient: Tensor) -> Tensor:
        if self._preconditioner == "identity":
            return gradient
        decay = self.config.betas[1]
        v = self._second_moments.setdefault(name, torch.zeros_like(gradient))
        v.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
        return gradient / ((v / (1 - decay**self.steps)).sqrt() + self.config.eps)


class InstantCriticTrainer(CriticTrainer):
    """Owns the teacher's copy, whose weights stand still, and its direction."""

    optimizer: InstantOptimizer

    def __init__(
        self,
        critic: Critic,
        config: CriticConfig,
        world: World,
        total_steps: int,
        preconditioner: Preconditioner = "adam",
    ):
        """critic: as it begins, the teacher. Of config, betas[1] and eps count; there is no learning rate."""
        super().__init__(critic, config, world, total_steps)
        self.optimizer = InstantOptimizer(critic, config, world, preconditioner)

    def answer(self, query: Query) -> Tensor:
        """The change of x0 along the direction, [B, C, H, W]; other queries as a trained critic answers them.

        Raises ConfigError for a guided query and ValueError before the first update.
        """
        if query.want != "tangent":
            return super().answer(query)
        if query.guidance_scale != 1.0:
            raise ConfigError(
                f"teacher.guidance_scale={query.guidance_scale} must be 1 with method.variant=instant"
            )
        direction = self.optimizer.direction
        if not direction:
            raise ValueError(
                "this instant critic has no direction yet: its update comes before the generator's"
            )
        weights = {name: weight for name, weight in self.critic.named_parameters() if name in direction}

        def x0(weights: dict[str, Tensor]) -> Tensor:
            answer: Tensor = torch.func.functional_call(
                self.critic, weights, (query.x_t, query.t, query.cond)
            )
            return answer

        with (
            torch.set_grad_enabled(query.x_t.requires_grad),
            frozen_weights(self.critic),
            _forward_mode(self.critic.denoiser),
        ):
            tangent: Tensor = torch.func.jvp(x0, (weights,), (direction,))[1]
        return tangent


@contextmanager
def _forward_mode(denoiser: Denoiser) -> Iterator[None]:
    """Neither fused attention nor autocast nor, with channels last, group norms can be differentiated forward: without
    them, in fp32."""

    def contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(each.contiguous() for each in inputs)

    norms = [module for module in denoiser.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(contiguous) for norm in norms]
    dtype, denoiser.dtype = denoiser.dtype, "fp32"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        denoiser.dtype = dtype
        for hook in hooks:
            hook.remove()
