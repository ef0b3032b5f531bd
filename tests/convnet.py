"""A small residual convolution network with everything that convolution kernels differ in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class ConvBlock(nn.Module):
    """Residual 1x1, 3x3 (strided or depthwise), 1x1, with a projection where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        mid = cout // 2
        self.reduce = conv_bn(cin, mid, 1)
        self.spatial = conv_bn(mid, mid, 3, stride, groups=mid if depthwise else 1)
        self.expand = conv_bn(mid, cout, 1)
        self.shortcut = nn.Identity() if (cin, stride) == (cout, 1) else conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + self.shortcut(x))


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(cout)
    # Fresh statistics (0 and 1) would make a wrong fold of the norm into the convolution invisible.
    norm.running_mean = 0.1 * torch.randn(cout)
    norm.running_var = 0.5 + torch.rand(cout)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.1)
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), norm)


def convnet(batch: int = 1, size: int = 64) -> Example:
    torch.manual_seed(0)
    stem = nn.Sequential(conv_bn(3, 32, 3, stride=2), nn.ReLU())
    body = [ConvBlock(32, 64), ConvBlock(64, 64, depthwise=True), ConvBlock(64, 128, 2), ConvBlock(128, 128, 2, True)]
    model = nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval()
    return model, (torch.randn(batch, 3, size, size),), {}
