"""What a method may ask of a network: `Denoiser` maps (x_t, t, cond) to x0, wherever and however it is computed."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from raydistill.diffusion.guidance import guide
from raydistill.diffusion.parametrization import Prediction
from raydistill.diffusion.schedules import NoiseSchedule
from raydistill.diffusion.shards import held_state
from raydistill.errors import ConfigError

Again = Callable[[Callable[..., Any]], Callable[..., Any]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cond:
    """What a batch is conditioned on: named tensors, batch first.

    `text` [B, L, D]; SDXL adds `pooled` [B, P] and `time_ids` [B, 6]; class-conditional networks use `label` [B].
    """

    tensors: Mapping[str, Tensor]

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    def to(self, device: torch.device | str) -> Cond:
        return Cond({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def expand(self, batch_size: int) -> Cond:
        """A single sample's condition, repeated without a copy."""
        return Cond({name: row.expand(batch_size, *row.shape[1:]) for name, row in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Cond]) -> Cond:
        """Join batches. Raises ConfigError where they are not conditioned on the same things."""
        names = set(parts[0].tensors)
        for part in parts[1:]:
            if set(part.tensors) != names:
                raise ConfigError(
                    f"conditions {sorted(part.tensors)} can't join a batch of {sorted(names)}: "
                    "the shards were made for another teacher (data.shards, teacher.path)"
                )
        return Cond({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Denoiser(nn.Module, ABC):
    """Posterior mean of the clean sample, E[x0 | x_t].

    x_t is [B, C, H, W] float32, t is [B] in the schedule's own units, the answer has x_t's shape and dtype. Casts to
    the network's own precision happen inside.
    """

    schedule: NoiseSchedule
    prediction: Prediction = "x0"
    """What the network itself predicts."""
    dtype: str = "fp32"
    """What the network computes in; fp32 weights then run under autocast."""

    @property
    def network(self) -> nn.Module:
        """The module that does the work, which is compiled, counted and laid out in memory."""
        return self

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Parts that are called one after the other: where the network is sharded, each is gathered on its own."""
        return ()

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x0 [B, C, H, W]."""

    @classmethod
    def import_libraries(cls) -> None:
        """Import what the network is made of, as it must be before one arrives from another process."""

    def cast(self, dtype: str) -> Self:
        """Weights and arithmetic in `dtype`, in place; for a network that is not trained."""
        self.network.to(DTYPES[dtype])
        self.dtype = dtype
        return self

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """How the names of the layers end that adapters go into, by the setting `lora_targets`.

        Raises ConfigError where that is not known.
        """
        raise ConfigError(
            f"{type(self).__name__} has no known places for adapters: generator.lora_rank, critic.lora_rank must be 0"
        )

    def checkpoint_activations(self, again: Again = lambda function: function) -> None:
        """Recompute activations in the backward pass. Raises ConfigError where the network can't.

        again: makes of each recomputed function, in the forward pass, what is called then and in the backward pass.
        """
        raise ConfigError(
            f"train.activation_checkpointing=true: {type(self).__name__} can't recompute its activations"
        )

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Bottleneck features [B, D, h, w], computed without the decoder half."""
        raise ConfigError(
            f"{type(self).__name__} has no bottleneck features, which a GAN head needs: "
            "set method.gan_weight_generator=0 and method.gan_weight_critic=0, or use a UNet"
        )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples that the network is made for. Raises ConfigError where it fits any."""
        raise ConfigError(f"{type(self).__name__} is made for samples of any shape")

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of `features`. Raises ConfigError where the network has none."""
        raise ConfigError(f"{type(self).__name__} has no bottleneck features (needed by a GAN head)")


def denoise_guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, null_cond: Cond | None, guidance_scale: float
) -> Tensor:
    """x0 = uncond + scale (cond - uncond), both halves in one batch; scale 1 asks the conditional half only.

    Raises ConfigError when guidance is asked of a network that has no null condition.
    """
    if guidance_scale == 1.0:
        return denoiser(x_t, t, cond)
    if null_cond is None:
        raise ConfigError(
            f"teacher.guidance_scale is {guidance_scale}, but this teacher has no null condition: only 1 is possible"
        )
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([cond, null_cond]))
    x0_cond, x0_uncond = both.chunk(2)
    return guide(x0_cond, x0_uncond, guidance_scale)


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """Gradients flow through the module to its input, none are computed for its weights."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@dataclass(frozen=True)
class Packed:
    """A `skeleton` on its way to another process of this program."""

    kind: type[Denoiser]
    pickled: bytes

    @staticmethod
    def of(denoiser: Denoiser) -> Packed:
        return Packed(type(denoiser), pickle.dumps(skeleton(denoiser)))

    def unpack(self) -> Denoiser:
        self.kind.import_libraries()
        denoiser: Denoiser = pickle.loads(self.pickled)
        return denoiser


def skeleton(denoiser: Denoiser) -> Denoiser:
    """The denoiser without its weights; `with_weights` makes it whole."""
    state = denoiser.state_dict(keep_vars=True)
    memo: dict[int, Any] = {}
    for tensor in state.values():
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(denoiser, memo)


def with_weights(denoiser: Denoiser, weights: Mapping[str, Tensor]) -> Denoiser:
    """A `skeleton` on these very tensors, which are not copied; frozen."""
    denoiser.load_state_dict(weights, assign=True)
    return denoiser.eval().requires_grad_(False)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def state_for_saving(module: nn.Module) -> dict[str, Any]:
    """Weights as contiguous tensors, ready for safetensors; of a sharded module this process's rows."""
    return {name: tensor.contiguous() for name, tensor in held_state(module).items()}
