"""Small models of images beside eager PyTorch: resampling, sampling by a grid, unpooling, windows, running statistics.

Each compiles to a portable program; outputs, gradients and buffers are eager's over two steps.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from versus_eager import compare, copied, run
from zoo import Case

import daggc


class UNet(nn.Module):
    """Down twice, up once by a transposed convolution and once by interpolation, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 6, 4, padding="same", dilation=(1, 2)), nn.GroupNorm(3, 6), nn.SiLU())
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=(0, 1), groups=2)
        self.smooth = nn.Upsample(size=(9, 12), mode="bilinear", align_corners=True)
        self.last = nn.Conv2d(10, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = F.relu(self.first(x))
        half = self.second(F.avg_pool2d(whole, 2, ceil_mode=True, count_include_pad=False))
        up = self.up(self.down(half)) + half
        return self.last(torch.cat([self.smooth(up), whole], 1))


class SpatialTransformer(nn.Module):
    """Jaderberg et al. (2015): a network says how to move the image that it sees."""

    def __init__(self, mode: str, padding: str, align_corners: bool) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(27, 6))
        self.mode, self.padding, self.align_corners = mode, padding, align_corners

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.look(x).view(-1, 2, 3)
        grid = F.affine_grid(theta, [x.shape[0], 2, 5, 4], align_corners=self.align_corners)
        return F.grid_sample(x, grid, self.mode, self.padding, self.align_corners)


class Autoencoder(nn.Module):
    """Maxima go back to where they were; the image is cut into windows, shuffled and put together."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.unfold = nn.Unfold((2, 3), padding=(1, 0), stride=(2, 1))
        self.fold = nn.Fold((8, 6), (2, 3), padding=(1, 0), stride=(2, 1))
        self.mix = nn.Linear(20, 20)
        self.shrink, self.grow = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.shuffle = nn.ChannelShuffle(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small, places = self.pool(x)
        x = self.unpool(torch.tanh(small), places) + x
        x = self.fold(self.mix(self.unfold(x)))
        return self.grow(F.local_response_norm(self.shuffle(self.shrink(x)), 3))


class RunningStatistics(nn.Module):
    """Statistics that export would lose, or that depend on how many batches there were."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = nn.BatchNorm2d(3, momentum=None)
        self.instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(self.counting(x), scale_factor=1.6, mode="bicubic")
        return F.pad(self.instance(x), (2, -1, 0, 3), mode="circular")


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "u_net": (UNet, (2, 2, 9, 12)),
    "transformer_bilinear": (lambda: SpatialTransformer("bilinear", "zeros", False), (2, 2, 6, 7)),
    "transformer_bicubic": (lambda: SpatialTransformer("bicubic", "reflection", True), (2, 2, 6, 7)),
    "autoencoder": (Autoencoder, (2, 4, 8, 6)),
    "running_statistics": (RunningStatistics, (2, 3, 5, 4)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str, training: bool) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    mine = Case(make().double().train(training), (torch.randn(shape).double().requires_grad_(),), {})
    theirs = copied(mine)
    assert daggc.trace(copied(mine).model, mine.args).portable
    compiled = daggc.compile(mine.model)
    for _ in range(2):
        got, eager = run(compiled, mine, True), run(theirs.model, theirs, True)
        compare(got, eager, eager, exact=True)
