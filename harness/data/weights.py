"""An order in which samples are drawn by lot, each as often as its weight says."""

from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from harness.data.seeding import mix
from harness.errors import ConfigError


class Weights:
    """Draws samples with replacement, each as often as its weight says, as torch's ``WeightedRandomSampler`` does.

    The sample at a position is a function of the seed, the epoch and the position. It is where a uniform number falls in the
    running sum of the weights. The number is that of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014), with the position as its counter. Kept are 8 bytes a sample.
    """

    def __init__(self, weights: Any, samples: int) -> None:
        if isinstance(weights, torch.Tensor):
            weights = weights.detach().to("cpu", torch.float64).numpy()
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (samples,):
            raise ConfigError(f"weights: expected one for each of the {samples} samples, found the shape {values.shape}")
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(bad):
            raise ConfigError(f"weights: expected finite numbers from 0, found {values[bad[0]]} for sample {bad[0]}")
        with np.errstate(over="ignore"):
            sums = np.cumsum(values)
        if not 0 < sums[-1] < np.inf:
            raise ConfigError(f"weights: expected a finite sum above 0, found {sums[-1]}")
        self._sums = sums / sums[-1]  # the last one is 1, and a uniform number is below it
        self.digest = xxhash.xxh3_128_hexdigest(self._sums.astype("<f8").tobytes())

    def between(self, seed: int, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at the positions from ``start`` to ``stop`` of an epoch. Shape (stop - start,)."""
        key = np.uint64(mix(seed, epoch, len(self._sums)))
        numbers = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        uniform = ((numbers ^ numbers >> np.uint64(31)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.searchsorted(self._sums, uniform, side="right").astype(np.int64)
