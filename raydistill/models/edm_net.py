"""Class-conditional pixel networks of EDM's two families, and the denoiser that preconditions them.

DDPM++ (Song et al., arXiv:2011.13456) and ADM (Dhariwal & Nichol, arXiv:2105.05233) in the configurations of EDM
(Karras et al., arXiv:2206.00364, tables 1 and 7), whose published weights fit (`edm_pickle`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydistill.diffusion.parametrization import EDMPreconditioner, Prediction
from raydistill.diffusion.schedules import EDMSchedule, expand
from raydistill.errors import ConfigError, DataError
from raydistill.models.denoiser import Again, Cond, Denoiser

FAMILIES = ("ddpmpp", "adm")

_EMBEDDING_MULT = 4  # channels of the embedding over base_channels
_HEAD_CHANNELS = 64  # of ADM's attention; DDPM++ has one head


@dataclass(frozen=True)
class EDMNetConfig:
    """Shape of an `EDMNet` and scales of its data. Raises ConfigError for a value that can't work."""

    family: Literal["ddpmpp", "adm"]
    image_size: int
    """Edge of the square images in pixels."""
    channels: int
    """Of an image."""
    label_dim: int
    """Number of classes; 0 for an unconditional network."""
    base_channels: int
    channel_mult: tuple[int, ...]
    """Width of each level over base_channels; each level halves the image."""
    blocks_per_level: int
    attention_sizes: tuple[int, ...]
    """Edges of the feature maps that have attention, besides the network's middle, which always has it. ADM has a head
    for every 64 channels, so none on narrower maps."""
    dropout: float = 0.0
    augment_dim: int = 0
    """Length of EDM's augmentation labels, which are always zero here; 0 for a network without them."""
    sigma_data: float = 0.5
    """Standard deviation of the data."""
    sigma_min: float = 0.002
    """Lowest noise level of sampling."""
    sigma_max: float = 80.0
    """Highest noise level of sampling."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"family={self.family!r} is not one of {', '.join(FAMILIES)}")
        # the upper bounds are far from any network's, and keep a damaged file from filling the memory
        for name, least, most in (
            ("image_size", 1, 4096), ("channels", 1, 1024), ("base_channels", 4, 4096), ("blocks_per_level", 1, 64),
            ("label_dim", 0, 10**6), ("augment_dim", 0, 1024),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be from {least} to {most}")
        if not 1 <= len(self.channel_mult) <= 12 or not all(1 <= mult <= 64 for mult in self.channel_mult):
            raise ConfigError(
                f"channel_mult={self.channel_mult} must be a list of 1 to 12 numbers from 1 to 64"
            )
        halvings = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % halvings:
            raise ConfigError(
                f"image_size={self.image_size} can't be halved {len(self.channel_mult) - 1} times (channel_mult)"
            )
        if self.base_channels % 4:
            raise ConfigError(f"base_channels={self.base_channels} must be a multiple of 4")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout:g} must be in [0, 1)")
        EDMPreconditioner(self.sigma_data)
        EDMSchedule(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @classmethod
    def cifar10(cls) -> EDMNetConfig:
        """Class-conditional CIFAR-10, 55.7M parameters (arXiv:2206.00364, table 7)."""
        return cls(
            family="ddpmpp", image_size=32, channels=3, label_dim=10, base_channels=128, channel_mult=(2, 2, 2),
            blocks_per_level=4, attention_sizes=(16,), dropout=0.13, augment_dim=9,
        )  # fmt: skip

    @classmethod
    def imagenet64(cls) -> EDMNetConfig:
        """Class-conditional ImageNet at 64x64, 295.9M parameters (arXiv:2206.00364, table 7)."""
        return cls(
            family="adm", image_size=64, channels=3, label_dim=1000, base_channels=192, channel_mult=(1, 2, 3, 4),
            blocks_per_level=3, attention_sizes=(32, 16, 8), dropout=0.1,
        )  # fmt: skip

    @classmethod
    def digits(cls) -> EDMNetConfig:
        """scikit-learn's 8x8 grey digits: 0.2M parameters, which a CPU trains in minutes."""
        return cls(
            family="ddpmpp", image_size=8, channels=1, label_dim=10, base_channels=16, channel_mult=(1, 2),
            blocks_per_level=1, attention_sizes=(),
        )  # fmt: skip


@dataclass(frozen=True)
class _Traits:
    """Where the blocks of the two families differ."""

    norm_eps: float
    scale_and_shift: bool
    """The embedding scales and shifts the second norm's output, instead of being added before it."""
    branch_gain: float
    """Of a sum of two branches."""
    project_resampled: bool
    """A resampled shortcut has a 1x1 convolution even where the width stays."""
    attention_in_decoder: Literal["every block", "last block"]

    def heads(self, channels: int) -> int:
        return channels // _HEAD_CHANNELS if self.scale_and_shift else 1


_TRAITS = {
    "ddpmpp": _Traits(1e-6, False, math.sqrt(0.5), True, "last block"),
    "adm": _Traits(1e-5, True, 1.0, False, "every block"),
}


class EDMNet(nn.Module):
    """F of EDM's table 1: (c_in x, c_noise, classes) -> [B, C, H, W].

    Names of submodules follow NVIDIA's up to a renaming (`edm_pickle.own_name`).
    """

    def __init__(self, config: EDMNetConfig):
        super().__init__()
        self.config = config
        self.recompute: Again | None = None
        """Not None: blocks recompute their activations in the backward pass, each as what this makes of it."""
        traits = _TRAITS[config.family]
        base, embedding = config.base_channels, config.base_channels * _EMBEDDING_MULT

        if config.label_dim and config.family == "ddpmpp":
            self.embed_label = nn.Linear(config.label_dim, base)
        elif config.label_dim:
            self.embed_label = nn.Linear(config.label_dim, embedding, bias=False)
        if config.augment_dim:
            self.embed_augment = nn.Linear(config.augment_dim, base, bias=False)
        self.embed0 = nn.Linear(base, embedding)
        self.embed1 = nn.Linear(embedding, embedding)

        self.encoder = nn.ModuleDict()
        widths = []  # of what the decoder concatenates
        width = base * config.channel_mult[0] if traits.scale_and_shift else base
        levels = [(config.image_size >> level, base * mult) for level, mult in enumerate(config.channel_mult)]
        for level, (size, level_width) in enumerate(levels):
            if level == 0:
                self.encoder[f"{size}x{size}_conv"] = nn.Conv2d(config.channels, width, 3, padding=1)
            else:
                self.encoder[f"{size}x{size}_down"] = _Block(config, width, width, resample="down")
            widths.append(width)
            for i in range(config.blocks_per_level):
                attention = size in config.attention_sizes
                self.encoder[f"{size}x{size}_block{i}"] = _Block(
                    config, width, level_width, attention=attention
                )
                width = level_width
                widths.append(width)
        self.feature_shape: tuple[int, int, int] = (width, levels[-1][0], levels[-1][0])

        self.decoder = nn.ModuleDict()
        for level, (size, level_width) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.decoder[f"{size}x{size}_in0"] = _Block(config, width, width, attention=True)
                self.decoder[f"{size}x{size}_in1"] = _Block(config, width, width)
            else:
                self.decoder[f"{size}x{size}_up"] = _Block(config, width, width, resample="up")
            for i in range(config.blocks_per_level + 1):
                last = i == config.blocks_per_level
                self.decoder[f"{size}x{size}_block{i}"] = _Block(
                    config,
                    width + widths.pop(),
                    level_width,
                    attention=size in config.attention_sizes
                    and (last or traits.attention_in_decoder == "every block"),
                    takes_skip=True,
                )
                width = level_width
        self.out_norm = _group_norm(width, traits.norm_eps)
        self.out_conv = nn.Conv2d(width, config.channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, classes: Tensor) -> Tensor:
        """x [B, C, H, W] in the weights' dtype; noise [B], c_noise; classes [B, label_dim], one-hot."""
        embedding = self._embed(noise, classes)
        skips = self._encode(x, embedding)
        x = skips[-1]
        for block in self.decoder.values():
            if block.takes_skip:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))

    def features(self, x: Tensor, noise: Tensor, classes: Tensor) -> Tensor:
        """What the encoder hands to the decoder, [B, *feature_shape]."""
        return self._encode(x, self._embed(noise, classes))[-1]

    def _encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        outputs = []
        for block in self.encoder.values():
            x = self._run(block, x, embedding) if isinstance(block, _Block) else block(x)
            outputs.append(x)
        return outputs

    def _run(self, block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.recompute(block), x, embedding, use_reentrant=False)
        return block(x, embedding)

    def _embed(self, noise: Tensor, classes: Tensor) -> Tensor:
        config, dtype = self.config, self.embed0.weight.dtype
        half = config.base_channels // 2
        # DDPM++ spreads its frequencies over 1 .. 1/10000 with both ends, ADM leaves the last one out
        steps = half - 1 if config.family == "ddpmpp" else half
        exponent = torch.arange(half, dtype=torch.float64, device=noise.device) / steps
        angle = noise.double()[:, None] * 10000.0**-exponent
        if config.family == "ddpmpp":
            embedding = torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
            if config.label_dim:
                embedding = embedding + self.embed_label(classes.to(dtype) * math.sqrt(config.label_dim))
        else:
            embedding = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        if config.augment_dim:
            # adds nothing, and gives the weights a gradient (of zero), which optimisers and reductions want
            embedding = embedding + self.embed_augment(embedding.new_zeros(len(noise), config.augment_dim))
        embedding = self.embed1(F.silu(self.embed0(embedding)))
        if config.label_dim and config.family == "adm":
            embedding = embedding + self.embed_label(classes.to(dtype))
        return F.silu(embedding)


class _Block(nn.Module):
    """A residual block, followed by attention where it is asked for."""

    def __init__(
        self,
        config: EDMNetConfig,
        channels_in: int,
        channels_out: int,
        *,
        resample: Literal["", "up", "down"] = "",
        attention: bool = False,
        takes_skip: bool = False,
    ):
        super().__init__()
        traits = _TRAITS[config.family]
        self.traits = traits
        self.resample = resample
        self.takes_skip = takes_skip
        self.norm0 = _group_norm(channels_in, traits.norm_eps)
        self.conv0 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        modulations = 2 if traits.scale_and_shift else 1
        self.affine = nn.Linear(config.base_channels * _EMBEDDING_MULT, channels_out * modulations)
        self.norm1 = _group_norm(channels_out, traits.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv1 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        projected = channels_in != channels_out or (bool(resample) and traits.project_resampled)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if projected else nn.Identity()
        self.heads = traits.heads(channels_out) if attention else 0
        if self.heads:
            if channels_out % self.heads:
                raise ConfigError(
                    f"{channels_out} channels (base_channels * channel_mult) can't be split into {self.heads} "
                    "attention heads"
                )
            self.norm2 = _group_norm(channels_out, traits.norm_eps)
            self.qkv = nn.Conv2d(channels_out, 3 * channels_out, 1)
            self.proj = nn.Conv2d(channels_out, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        modulation = self.affine(embedding)[:, :, None, None]
        if self.traits.scale_and_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = shift + self.norm1(h) * (scale + 1)
        else:
            h = self.norm1(h + modulation)
        h = self.conv1(self.dropout(F.silu(h)))
        x = (self.skip(self._resampled(x)) + h) * self.traits.branch_gain
        if self.heads:
            x = (x + self._attention(self.norm2(x))) * self.traits.branch_gain
        return x

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def _attention(self, x: Tensor) -> Tensor:
        # written out: the fused kernels have neither forward-mode nor second derivatives
        b, c, height, width = x.shape
        q, k, v = self.qkv(x).reshape(b * self.heads, c // self.heads, 3, height * width).unbind(2)
        scores = torch.bmm(q.transpose(1, 2) / math.sqrt(q.shape[1]), k)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        return self.proj(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, height, width))


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if channels % groups:
        raise ConfigError(
            f"{channels} channels can't be normalised in {groups} groups: choose base_channels and channel_mult for "
            "widths that are multiples of 4 up to 128 and of 32 above"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


class EDMDenoiser(Denoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise, class). arXiv:2206.00364, eq. 7 and table 1.

    t is sigma. `cond.tensors["label"]` [B] holds class numbers, integers in any dtype, since labels travel among
    float arrays.
    """

    prediction: Prediction = "x0"

    def __init__(self, config: EDMNetConfig, dtype: str = "fp32"):
        """dtype: what the network computes in; fp32 weights then run under autocast."""
        super().__init__()
        self.config = config
        self.net = EDMNet(config)
        self.schedule = EDMSchedule(sigma_min=config.sigma_min, sigma_max=config.sigma_max)
        self.dtype = dtype
        self._preconditioner = EDMPreconditioner(config.sigma_data)

    @classmethod
    def random(cls, config: EDMNetConfig, seed: int) -> EDMDenoiser:
        """Weights as EDM begins training with, drawn from `seed` alone."""
        denoiser = cls.on_meta(config).to_empty(device="cpu")
        _init_weights(denoiser.net, torch.Generator().manual_seed(seed))
        return denoiser

    @classmethod
    def on_meta(cls, config: EDMNetConfig) -> EDMDenoiser:
        """Shapes without weights."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def from_weights(cls, config: EDMNetConfig, weights: Mapping[str, Tensor]) -> EDMDenoiser:
        """The denoiser on these very tensors, named as in `EDMNet`.

        Raises ConfigError for a missing, foreign or misshapen one.
        """
        denoiser = cls.on_meta(config)
        wanted = {name: tuple(tensor.shape) for name, tensor in denoiser.net.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ConfigError(
                    f"weight {name} has shape {found.get(name, 'missing')}, the configuration needs "
                    f"{wanted.get(name, 'none of that name')}"
                )
        denoiser.net.load_state_dict(weights, assign=True)
        return denoiser

    @property
    def network(self) -> EDMNet:
        return self.net

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.net.encoder.values(), *self.net.decoder.values()]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.config.channels, self.config.image_size, self.config.image_size

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        return self.net.feature_shape

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sigma, c = self.schedule.sigma(t), self._preconditioner
        with self._precision(x_t):
            output = self.net(*self._inputs(x_t, sigma, cond))
        c_skip, c_out = (expand(v.to(x_t.dtype), x_t) for v in (c.c_skip(sigma), c.c_out(sigma)))
        return c_skip * x_t + c_out * output.to(x_t.dtype)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The encoder's last output [B, *feature_shape]; the decoder is not run."""
        with self._precision(x_t):
            return self.net.features(*self._inputs(x_t, self.schedule.sigma(t), cond))

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """Attention's projections, or also every block's convolutions and modulation."""
        attention = ("qkv", "proj")
        return {"attention": attention, "all": (*attention, "conv0", "conv1", "affine")}

    def checkpoint_activations(self, again: Again = lambda function: function) -> None:
        self.net.recompute = again

    def _inputs(self, x_t: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        c = self._preconditioner
        scaled = expand(c.c_in(sigma).to(x_t.dtype), x_t) * x_t
        return scaled.to(self._weights_dtype), c.c_noise(sigma), self._one_hot(cond.tensors["label"])

    def _one_hot(self, label: Tensor) -> Tensor:
        """[B, label_dim]. No such class: DataError on the CPU; NaN elsewhere, where a check would stall the step."""
        dtype = self._weights_dtype
        if not self.config.label_dim:
            return torch.empty(len(label), 0, dtype=dtype, device=label.device)
        classes = label[:, None] == torch.arange(self.config.label_dim, device=label.device)
        known = classes.any(dim=1, keepdim=True)
        if label.device.type == "cpu" and not known.all():
            wrong = label[~known[:, 0]][0].item()
            raise DataError(
                f"class label {wrong:g} is not a whole number from 0 to {self.config.label_dim - 1} (data.shards)"
            )
        return torch.where(known, classes.to(dtype), torch.nan)

    @property
    def _weights_dtype(self) -> torch.dtype:
        return self.net.out_conv.weight.dtype

    def _precision(self, x: Tensor) -> AbstractContextManager[None]:
        if self.dtype == "bf16" and self._weights_dtype == torch.float32:
            return torch.autocast(x.device.type, dtype=torch.bfloat16)
        return nullcontext()


def _init_weights(net: EDMNet, generator: torch.Generator) -> None:
    """EDM's initialisation (arXiv:2206.00364, appendix F): uniform, with the last layer of each branch at or near 0."""
    ddpmpp = net.config.family == "ddpmpp"
    for name, module in net.named_modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            last = name.rpartition(".")[2] in ("conv1", "proj", "out_conv")
            if ddpmpp:
                nn.init.xavier_uniform_(module.weight, generator=generator)
                gain = 1e-5 if last else math.sqrt(0.2) if name.endswith("qkv") else 1.0
            elif name == "embed_label":
                nn.init.normal_(module.weight, generator=generator)
                gain = 1.0
            else:
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                gain = 0.0 if last else 1.0
            with torch.no_grad():
                module.weight.mul_(gain)
            if module.bias is not None:
                if ddpmpp or last:
                    nn.init.zeros_(module.bias)
                else:
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
