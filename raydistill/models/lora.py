"""The door to peft: trained networks as low-rank adapters over one frozen base, which is also the teacher.

LoRA (arXiv:2106.09685, eq. 3): a layer answers W x + alpha/r B A x, with W frozen and A, B trained. Generator and
critic are two sets of A and B in the same network; with both switched off it is the teacher.
"""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydistill.errors import CheckpointError
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.torchvision_ops import ensure_torchvision_importable

LoraTargets = Literal["attention", "all"]
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@functools.cache
def import_peft() -> Any:
    """The library, imported when it is first needed: it brings transformers."""
    ensure_torchvision_importable()
    import peft

    return peft


@dataclass(frozen=True)
class Lora:
    """One adapter's shape."""

    rank: int
    alpha: float
    targets: LoraTargets

    @property
    def scale(self) -> float:
        """alpha / r, the factor of B A."""
        return self.alpha / self.rank


class _Linear(nn.Linear):
    """fp32 weights that compute in their input's precision: peft would make fp32 copies of every input instead."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class _Conv2d(nn.Conv2d):
    """As `_Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), None)


class SharedBase:
    """A frozen denoiser with any number of adapters in it, of which at most one answers at a time.

    Which one is a property of each call, not of the network: between calls all are off. A call may not be made while
    another thread makes one.
    """

    def __init__(self, denoiser: Denoiser):
        """denoiser: stays the very network that it was for those who have it, frozen and without dropout."""
        self.denoiser = denoiser.requires_grad_(False)
        for module in denoiser.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # it would draw from torch's global generator
        self._layers = {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._active: list[str] = []
        """Read by every layer of every adapter: peft keeps the list that it is given."""
        self._adapters: list[nn.Module] = []

    def teacher(self) -> AdaptedDenoiser:
        """The base with all adapters off, in its own arithmetic."""
        return AdaptedDenoiser(self, [], self.denoiser.dtype, nn.Module())

    def add(self, name: str, lora: Lora, *, dtype: str, seed: int) -> AdaptedDenoiser:
        """A new adapter, which changes nothing yet (B = 0), and the denoiser that answers with it.

        dtype: the arithmetic of its passes; A and B are fp32. A is drawn from `seed` and `name` alone.
        Raises ConfigError where it is not known which of the network's layers an adapter belongs into.
        """
        suffixes = tuple(f".{suffix}" for suffix in self.denoiser.lora_targets[lora.targets])
        places = [place for place in self._layers if place.endswith(suffixes)]
        peft = import_peft()
        adapter = nn.Module()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=places)
            peft.inject_adapter_in_model(config, self.denoiser, name)
            torch.manual_seed(seed + zlib.crc32(name.encode()))
            for place in places:
                layer: Any = self.denoiser.get_submodule(place)
                for suffix, matrix in ((_DOWN, layer.lora_A[name]), (_UP, layer.lora_B[name])):
                    matrix.float().__class__ = _Conv2d if isinstance(matrix, nn.Conv2d) else _Linear
                    _register(adapter, place + suffix, matrix.weight)
                # drawn again, for peft drew them in the base's precision
                layer.reset_lora_parameters(name, True)
                layer.cast_input_dtype_enabled = False
        self._adapters.append(adapter)
        # peft has switched the new one on everywhere, and freezes what is switched off
        for layer in self.denoiser.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_adapter(self._active)
        for each in self._adapters:
            each.requires_grad_(True)
        return AdaptedDenoiser(self, [name], dtype, adapter)

    @contextmanager
    def using(self, active: list[str], dtype: str) -> Iterator[None]:
        """Answer with these adapters, in this arithmetic, and afterwards as before."""
        before, before_dtype = self._active[:], self.denoiser.dtype
        self._active[:], self.denoiser.dtype = active, dtype
        try:
            yield
        finally:
            self._active[:], self.denoiser.dtype = before, before_dtype

    def checkpoint_activations(self) -> None:
        """Recompute activations in every backward pass through the base, with the adapter that made them."""
        self.denoiser.checkpoint_activations(self._as_now)

    def _as_now(self, function: Callable[..., Any]) -> Callable[..., Any]:
        active, dtype = self._active[:], self.denoiser.dtype

        def again(*inputs: Any) -> Any:
            with self.using(active, dtype):
                return function(*inputs)

        return again


class AdaptedDenoiser(Denoiser):
    """A shared base as one of its roles sees it: its weights, those trained, averaged and saved, are the adapter's."""

    def __init__(self, base: SharedBase, active: list[str], dtype: str, adapter: nn.Module):
        super().__init__()
        self._base = (base,)  # in a tuple, so that it is no submodule
        self._active = active
        self.schedule = base.denoiser.schedule
        self.prediction = base.denoiser.prediction
        self.dtype = dtype
        self.adapter = adapter

    @property
    def base(self) -> SharedBase:
        return self._base[0]

    @property
    def network(self) -> nn.Module:
        return self.base.denoiser.network

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.base.using(self._active, self.dtype):
            return self.base.denoiser(x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self.base.using(self._active, self.dtype):
            return self.base.denoiser.features(x_t, t, cond)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.base.denoiser.sample_shape

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        return self.base.denoiser.feature_shape


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's weights with an adapter's scale B A added: a network of its own, without peft.

    base: by the names of the plain denoiser; those that the adapter leaves alone are not copied. adapter: by the names
    of an `AdaptedDenoiser`. Raises CheckpointError for an adapter of another network.
    """
    weights = dict(base)
    for name, down in adapter.items():
        if not name.endswith(_DOWN):
            continue
        place = name.removesuffix(_DOWN).removeprefix("adapter.")
        up, weight = adapter[name.removesuffix(_DOWN) + _UP], base.get(f"{place}.weight")
        if weight is None or weight.shape[:2] != (up.shape[0], down.shape[1]):
            raise CheckpointError(f"the adapter's {place} is no layer of this teacher (teacher.path)")
        device = weight.device
        change = torch.einsum("or,r...->o...", up.flatten(1).float(), down.float()).to(device)
        weights[f"{place}.weight"] = weight + (scale * change).to(weight.dtype)
    return weights


def for_diffusers(adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter by the names of diffusers' `load_lora_weights`, which reads alpha = r: the scale goes into A and B."""
    factor = math.sqrt(scale)
    return {name.removeprefix("adapter."): (tensor * factor).contiguous() for name, tensor in adapter.items()}


def _register(root: nn.Module, path: str, weight: nn.Parameter) -> None:
    """Give a module tree a weight of this dotted name."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, weight)
