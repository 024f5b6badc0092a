"""The critic: a denoiser of the generator's distribution (the "fake score"), with an optional GAN head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raydistill.errors import ConfigError
from raydistill.models.denoiser import Cond, Denoiser, denoise_guided


class Critic(nn.Module):
    """The generator's own denoiser and, for methods with adversarial terms, a discriminator on bottleneck features.

    The features are the critic's own, or those of a frozen network given as `feature_source` (the teacher), which
    belongs to somebody else and is neither trained nor saved here.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        head: nn.Module | None,
        feature_source: Denoiser | None = None,
        null_cond: Callable[[int], Cond] | None = None,
    ):
        """null_cond: the unconditional half for a batch size, None where the teacher has none."""
        super().__init__()
        self.denoiser = denoiser
        self.head = head
        self._feature_source = (feature_source,)  # in a tuple, so that it is no submodule
        self._null_cond = null_cond

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float = 1.0) -> Tensor:
        """x0 [B, C, H, W] as expected from the generator's samples."""
        null = self.null_cond(len(x_t)) if guidance_scale != 1.0 else None
        return denoise_guided(self.denoiser, x_t, t, cond, null, guidance_scale)

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logit [B] of "x_t is a noised real sample"."""
        if self.head is None:
            raise ValueError("this critic was built without a GAN head")
        source = self._feature_source[0] or self.denoiser
        return self.head(source.features(x_t, t, cond))

    def logit_map(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits [B, h, w] of a discriminator without weights of its own: the features' mean over their channels.

        SiDA (arXiv:2410.14919, section 3).
        """
        return self.denoiser.features(x_t, t, cond).float().mean(dim=1)

    def null_cond(self, batch_size: int) -> Cond:
        """The unconditional half of guidance. Raises ConfigError where the teacher has none."""
        if self._null_cond is None:
            raise ConfigError(
                "this teacher has no null condition (teacher.path): guidance scales, teacher.guidance_scale and the "
                "method's, must be 1"
            )
        return self._null_cond(batch_size)

    def drop_cond(self, cond: Cond, dropped: Tensor) -> Cond:
        """The condition with the rows of `dropped` [B] (bool) replaced by the null condition."""
        null = self.null_cond(len(dropped))
        return Cond(
            {
                name: torch.where(dropped.reshape(-1, *[1] * (rows.ndim - 1)), null.tensors[name], rows)
                for name, rows in cond.tensors.items()
            }
        )
