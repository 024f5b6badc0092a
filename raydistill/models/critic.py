"""The critic: a denoiser of the generator's distribution (the "fake score"), with an optional GAN head."""

from __future__ import annotations

from torch import Tensor, nn

from raydistill.models.denoiser import Cond, Denoiser


class Critic(nn.Module):
    """D_f and h of DMD2: `forward` is the denoiser, `logits` the head on bottleneck features.

    The features are the critic's own, or those of a frozen network given as `feature_source` (the teacher), which
    belongs to somebody else and is neither trained nor saved here.
    """

    def __init__(self, denoiser: Denoiser, head: nn.Module | None, feature_source: Denoiser | None = None):
        super().__init__()
        self.denoiser = denoiser
        self.head = head
        self._feature_source = (feature_source,)  # in a tuple, so that it is no submodule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x0 [B, C, H, W] as expected from the generator's samples."""
        return self.denoiser(x_t, t, cond)

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logit [B] of "x_t is a noised real sample"."""
        if self.head is None:
            raise ValueError("this critic was built without a GAN head")
        source = self._feature_source[0] or self.denoiser
        return self.head(source.features(x_t, t, cond))
