"""Masks with known structure, as functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest


@pytest.fixture(scope="session")
def trained_like() -> Callable[..., np.ndarray]:
    """Magnitude masks of weights with row, channel and tap scales; affinity > 0 hides 16 row clusters."""

    def make(rows=256, channels=64, taps=9, sparsity=0.9, affinity=0.6, seed=0):
        rng = np.random.default_rng(seed)
        scale = np.exp(0.3 * rng.standard_normal(rows))[:, None, None]
        scale = scale * np.exp(0.4 * rng.standard_normal(channels))[None, :, None]
        scale = scale * np.exp(0.2 * rng.standard_normal((channels, taps)))[None]
        cluster = rng.permutation(np.arange(rows) % 16)
        scale = scale * np.exp(affinity * rng.standard_normal((16, channels)))[cluster][:, :, None]
        weight = np.abs(rng.standard_normal((rows, channels, taps)) * scale).reshape(rows, -1)
        return weight > np.quantile(weight, sparsity)

    return make


@pytest.fixture(scope="session")
def planted() -> Callable[..., np.ndarray]:
    """Row groups of one size, each with its own random columns, in random row order."""

    def make(groups, group_rows, columns, density=0.1, seed=0):
        rng = np.random.default_rng(seed)
        mask = np.repeat(rng.random((groups, columns)) < density, group_rows, axis=0)
        return mask[rng.permutation(groups * group_rows)]

    return make
