"""An exponential moving average of a module's weights, with its half-life counted in images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raydistill.diffusion.shards import held_state
from raydistill.errors import CheckpointError, ConfigError


class EMA:
    """Average of the weights that a module had, those of `halflife_images` images ago counting half.

    Call `update` when the module has been updated, and only then. Parameters are averaged, in float32 at
    least: in bfloat16 small steps would be lost. Buffers are copied. Of a sharded module each process averages the rows
    that it holds.

    With `ramp`, the half-life is at most `ramp * images_seen`, so that a young average follows the weights:
    EDM's warm-up (arXiv:2206.00364; 0.05 in its code), whose first update copies them. Only then does the
    result depend on how the images are split into updates.
    """

    def __init__(self, module: nn.Module, halflife_images: float, ramp: float | None = None):
        """Starts from the module's weights. ConfigError unless halflife_images and ramp are positive."""
        if not halflife_images > 0:
            raise ConfigError(f"the EMA's half-life must be positive, got {halflife_images:g} images")
        if ramp is not None and not ramp > 0:
            raise ConfigError(f"the EMA's ramp must be positive or None, got {ramp:g}")
        self.halflife_images = halflife_images
        self.ramp = ramp
        self.images_seen = 0
        self._module = module
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self._averaged: dict[str, Tensor] = {}
        self._copied: dict[str, Tensor] = {}
        for name, tensor in held_state(module).items():
            if name in parameters and tensor.is_floating_point():
                self._averaged[name] = tensor.to(_average_dtype(tensor), copy=True)
            else:
                self._copied[name] = tensor.clone()

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Move towards the module's weights, after an update of it that used this many images (>= 1)."""
        if images < 1:
            raise ValueError(f"an update of the EMA needs at least 1 image, got {images}")
        halflife = self.halflife_images
        if self.ramp is not None:
            halflife = min(halflife, self.ramp * self.images_seen)
        decay = 0.5 ** (images / halflife) if halflife > 0 else 0.0
        self.images_seen += images
        state = held_state(self._module)
        averaged = list(self._averaged.values())
        weights = [state[name].to(average.dtype) for name, average in self._averaged.items()]
        if averaged:
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        for name, tensor in self._copied.items():
            tensor.copy_(state[name])

    def weights(self) -> dict[str, Tensor]:
        """The average, named as in `module.state_dict()`: the tensors themselves, which `update` changes."""
        return {**self._averaged, **self._copied}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], images_seen: int | None = None) -> None:
        """Take over a saved average. With `ramp`, `images_seen` must be given, for the warm-up not to start
        again.

        Raises CheckpointError if names or shapes differ from the module's.
        """
        if self.ramp is not None and images_seen is None:
            raise ValueError("an EMA with a ramp needs images_seen of the saved average")
        mine = self.weights()
        differing = sorted(mine.keys() ^ weights.keys())
        if differing:
            raise CheckpointError(
                f"the saved EMA and the module differ in {len(differing)} weights: {differing[0]}, ..."
            )
        for name, tensor in mine.items():
            if tensor.shape != weights[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(weights[name].shape)} in the saved EMA, "
                    f"{tuple(tensor.shape)} in the module"
                )
        for name, tensor in mine.items():
            tensor.copy_(weights[name])
        self.images_seen = images_seen if images_seen is not None else 0

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same architecture, in its own dtype."""
        module.load_state_dict(self.weights(), strict=True)


def _average_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
