"""DenseNet for small images (Huang et al., Densely Connected Convolutional Networks, 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldopt.checks import require_whole
from foldopt.errors import InputError

BLOCKS = 3


class DenseNet(nn.Module):
    """DenseNet-BC `depth`-`growth`: images (B, n_inputs, h, w), sides divisible by 4, to features (B, n_outputs).

    Three dense blocks with bottlenecks of 4 `growth` channels, and transitions that halve channels and sides between
    them. 40-40 is the paper's network, 22-12 one for a CPU.

    amp: on CUDA compute in bfloat16 where that is safe (autocast); a CPU ignores it, and the features are float32 in
    any case. compile: use torch.compile, which makes the first batch slow. perturbation: relative size of a random
    change of the initial weights, for control runs; otherwise 0.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        depth: int,
        growth: int,
        amp: bool,
        compile: bool,
        perturbation: float,
    ) -> None:
        super().__init__()
        require_whole("model.growth", growth, 1)
        require_whole("model.depth", depth, 10)
        layers, rest = divmod(depth - 4, 2 * BLOCKS)
        if rest:
            raise InputError(f"model.depth={depth}: a DenseNet-BC has a depth of 4 + 6 k, such as 22, 40 or 100.")
        channels = 2 * growth
        stages: list[nn.Module] = [nn.Conv2d(n_inputs, channels, 3, padding=1, bias=False)]
        for block in range(BLOCKS):
            stages += [_Layer(channels + k * growth, growth) for k in range(layers)]
            channels += layers * growth
            if block < BLOCKS - 1:
                stages.append(_Transition(channels, channels // 2))
                channels //= 2
        self.features = nn.Sequential(*stages, nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, n_outputs)
        self.amp = amp
        _initialize(self)
        if perturbation < 0:
            raise InputError(f"model.perturbation={perturbation}: a relative size is at least 0.")
        if perturbation:
            _perturb(self, perturbation)
        self.to(memory_format=torch.channels_last)
        if compile:
            self.features.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, (B, n_outputs), float32."""
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.amp and images.is_cuda):
            outputs = self.classifier(F.relu(self.features(images)).mean((2, 3)))
        return outputs.float()


class _Layer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(new)))], 1)


class _Transition(nn.Sequential):
    def __init__(self, channels: int, fewer: int) -> None:
        conv = nn.Conv2d(channels, fewer, 1, bias=False)
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.AvgPool2d(2))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _perturb(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.mul_(1 + size * torch.randn(p.shape, generator=generator))
