"""Scores of images: the reward, and what the reward does not see."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor

from .data import HELD_OUT, Digits


def symmetry(images: Tensor) -> Tensor:
    """The reward, `[batch]`, at most 0: minus the mean squared difference between an image and its mirror image.

    Odd digits other than 1 are not symmetric, so a policy pays for reward with legibility, and can be pushed too far:
    a blank sheet is perfectly symmetric.
    """
    return -(images - images.flip(-1)).square().flatten(1).mean(1)


class Judge:
    """Quality that was not trained for.

    `legible`: share of images that a support vector machine, fitted to the real digits, reads as their prompt. It is
    near 1 from the start and blind to everything but the class.

    `frechet`, the forgetting figure: Frechet distance (as in FID) between the images of the held-out prompts and the
    real digits of those classes, each taken as a Gaussian; squared pixel units, 0 is equal. It moves when these digits
    lose variety or change style, long before they become illegible. In the real digits' first 16 principal components
    (85 % of the variance): a covariance of 64 dimensions from 500 images is mostly noise. A finite sample puts it above
    0 for a perfect model too, so read it beside the pretrained model's own.
    """

    def __init__(self, data: Digits) -> None:
        pixels, labels = _pixels(data.images), data.labels.numpy()
        self._reader = SVC(C=10.0).fit(pixels, labels)
        self._pca = PCA(16, svd_solver="full").fit(pixels)
        self._real = self._pca.transform(pixels[np.isin(labels, HELD_OUT)])

    def scores(self, images: Tensor, prompts: Tensor) -> dict[str, float]:
        pixels, labels = _pixels(images), prompts.cpu().numpy()
        if not np.isfinite(pixels).all():  # a policy that diverged; scikit-learn refuses NaN
            return dict.fromkeys(("reward", "legible", "held_out_legible", "held_out_frechet"), float("nan"))
        right = self._reader.predict(pixels) == labels
        held_out = np.isin(labels, HELD_OUT)
        return {
            "reward": symmetry(images.cpu()[~held_out]).mean().item(),
            "legible": float(right[~held_out].mean()),
            "held_out_legible": float(right[held_out].mean()),
            "held_out_frechet": frechet_distance(self._real, self._pca.transform(pixels[held_out])),
        }


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of two samples `[count, features]`."""
    gap = first.mean(0) - second.mean(0)
    one, two = np.cov(first.T), np.cov(second.T)
    # The product's eigenvalues are those of a positive semi-definite matrix; rounding makes some slightly negative.
    shared = np.sqrt(np.clip(np.linalg.eigvals(one @ two).real, 0, None)).sum()
    return float(gap @ gap + np.trace(one) + np.trace(two) - 2 * shared)


def _pixels(images: Tensor) -> np.ndarray:
    return images.flatten(1).cpu().numpy().astype(np.float64)
