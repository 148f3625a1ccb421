"""The images: scikit-learn's 8x8 digits, which ship inside its package. A prompt is a digit class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10
SHAPE = (1, 8, 8)
NUMEL = 64  # latent elements per row: N of the losses

# Odd digits are fine-tuned, even digits never appear in a rollout: what happens to them is forgetting. Parity, so that
# nobody picked the digits that suit a result.
TRAINED = (1, 3, 5, 7, 9)
HELD_OUT = (0, 2, 4, 6, 8)


class Digits(NamedTuple):
    """images: `[1797, 1, 8, 8]` float32 in [-1, 1], -1 is paper and 1 is ink. labels: `[1797]` int64."""

    images: Tensor
    labels: Tensor


def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    return Digits(
        torch.tensor(images, dtype=torch.float32).reshape(-1, *SHAPE) / 8 - 1, torch.tensor(labels, dtype=torch.int64)
    )
