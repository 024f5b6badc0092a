"""GAN heads on a denoiser's bottleneck features."""

from __future__ import annotations

from torch import Tensor, nn

_KERNEL = 4


class BottleneckHead(nn.Module):
    """Logit of "real" from mid-block features (DMD2, 2405.14867 section 4.3 and its published configurations).

    Strided 4x4 convolutions halve the map while it is at least 8 wide, one convolution as large as what is left
    closes it, a 1x1 convolution gives the logit: for 8x8 features conv s2, conv 4x4, conv 1x1 (ImageNet-64, SD1.5);
    for SDXL's 32x32 three strided ones.
    """

    def __init__(self, channels: int, size: int):
        """channels, size: of the features [B, channels, size, size]."""
        super().__init__()
        # at least 4 channels a group: the last norm sees a 1x1 map, where a group of one would always be 0
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels >= 4 * g)
        layers: list[nn.Module] = []
        while size >= 2 * _KERNEL:
            layers += [
                nn.Conv2d(channels, channels, _KERNEL, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
            ]
            size //= 2
        layers += [
            nn.Conv2d(channels, channels, min(size, _KERNEL), stride=_KERNEL),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, D, h, w] -> logits [B]."""
        return self.layers(features.float()).flatten(1).mean(1)
