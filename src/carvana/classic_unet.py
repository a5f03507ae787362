"""The U-Net of the original paper and of the write-up that `profiles/seed.yaml` reproduces."""

import torch
from torch import nn


class ClassicUNet(nn.Module):
    """The original U-Net with about 31.0 M parameters: (B, 3, H, W) -> (B, 1, H, W) logits.

    Source: Ronneberger, Fischer, Brox 2015 (arXiv 1505.04597), with padding, and batch normalisation for higher rates.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024)):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.down = nn.ModuleList([_double(3, widths[0]), *(_double(fine, deep) for fine, deep in pairs)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, 2) for fine, deep in reversed(pairs))
        self.merge = nn.ModuleList(_double(deep, fine) for fine, deep in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Down with the finer maps kept, then up with each of them joined again."""
        kept = [self.down[0](x)]
        for block in self.down[1:]:
            kept.append(block(nn.functional.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for enlarge, block in zip(self.up, self.merge, strict=True):
            x = block(torch.cat([kept.pop(), enlarge(x)], 1))
        return self.head(x)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)
