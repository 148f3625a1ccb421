"""A class-conditional velocity model, and its pretraining by flow matching."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .data import CLASSES, NUMEL, Digits


class Velocity(nn.Module):
    """`v(x, sigma, prompt)` of the path `x = (1 - sigma) image + sigma noise`, so `v` estimates `noise - image`."""

    def __init__(self, width: int = 192, blocks: int = 3, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.linspace(-1, 4, frequencies))
        self.read = nn.Linear(NUMEL, width)
        self.time = nn.Linear(2 * frequencies, width)
        self.prompt = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.write = nn.Linear(width, NUMEL)

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """`x`: `[..., 1, 8, 8]`; `sigma`, `prompt`: broadcast to its leading dimensions. Returns the shape of `x`."""
        angles = sigma[..., None] * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.prompt(prompt)
        hidden = self.read(x.flatten(-3))
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return self.write(hidden).reshape(x.shape)


def pretrain(data: Digits, steps: int, device: str, batch: int = 256, learning_rate: float = 2e-3) -> Velocity:
    """Flow matching: regress `noise - image` at a random point of the path. The same start for every fine-tuning."""
    torch.manual_seed(0)  # seeds the layers' initial weights, which take no generator
    generator = torch.Generator().manual_seed(0)
    model = Velocity().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="pretraining", unit="step"):
        rows = torch.randint(len(data.labels), (batch,), generator=generator)
        image, prompt = data.images[rows].to(device), data.labels[rows].to(device)
        noise = torch.randn(image.shape, generator=generator).to(device)
        sigma = torch.rand(batch, generator=generator).to(device)
        x = torch.lerp(image, noise, sigma[:, None, None, None])
        loss = functional.mse_loss(model(x, sigma, prompt), noise - image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model
