"""The order of an epoch: a permutation of its samples that is a function of the seed, the epoch and their number alone.

``feistel`` computes the sample at a position from the position: nothing is stored, and each position costs the same. It is
a keyed bijection on [0, n): a Feistel network on pairs of digits in base *a*, the smallest even number whose square is at
least n, with a counter-based round function. What falls outside of [0, n) goes through the network again until it is inside
(cycle walking), which keeps the bijection. So works bandwidth-optimal shuffling: Mitchell, Stokes, Frank, Holmes,
"Bandwidth-Optimal Random Shuffling for GPUs", 2021 (arXiv:2106.06161). Digits in any base are those of Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", 2002: of a large n hardly any position falls outside. With an even base, odd
permutations come, too.

All arithmetic is of 64-bit integers that wrap around, which every version of NumPy does alike; a test holds the results.

``randperm`` is torch's, materialised. Runs that began before there was another one go on with it.
"""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray

from harness.data.seeding import mix

FEISTEL, RANDPERM = "feistel", "randperm"
ALGORITHMS = (FEISTEL, RANDPERM)
WEIGHTS, BATCH_SAMPLER = "weights", "batch_sampler"  # orders that are made of what the user gives

_ROUNDS = 12  # after 6 the 24 orders of 4 samples differ in frequency by 6 %, after 12 by 0.1 %
_CHUNK_SAMPLES = 4096  # are computed at once: 32 KiB, and NumPy's calls cost little for each
_CHUNKS_KEPT = 8  # the ledger asks again for a batch, the loader's workers may be some batches ahead
_HALF = np.uint64(32)
_FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, with well-mixed bits


def samples_between(algorithm: str, samples: int, seed: int, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
    """The samples at the positions from ``start`` to ``stop`` of an epoch. Shape (stop - start,)."""
    if algorithm == RANDPERM:
        return _randperm(samples, seed, epoch)[start:stop]
    chunks = range(start // _CHUNK_SAMPLES, -(-stop // _CHUNK_SAMPLES))
    if start >= stop:
        return np.empty(0, np.int64)
    found = [_chunk(samples, seed, epoch, number) for number in chunks]
    found[-1] = found[-1][: stop - chunks[-1] * _CHUNK_SAMPLES]
    found[0] = found[0][start - chunks[0] * _CHUNK_SAMPLES :]
    return np.concatenate(found)


@functools.lru_cache(maxsize=_CHUNKS_KEPT)
def _chunk(samples: int, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    start = number * _CHUNK_SAMPLES
    positions = np.arange(start, min(start + _CHUNK_SAMPLES, samples), dtype=np.uint64)
    return feistel(positions, samples, seed, epoch).view(np.int64)


def feistel(positions: NDArray[np.uint64], samples: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """The sample at each of some positions, which are below ``samples``; that is below 2^63."""
    root = math.isqrt(samples - 1) + 1
    base = np.uint64(root + root % 2)
    keys = [np.uint64(mix(seed, epoch, samples, number)) for number in range(_ROUNDS)]
    found, limit = _network(positions, base, keys), np.uint64(samples)
    while len(outside := np.flatnonzero(found >= limit)):
        found[outside] = _network(found[outside], base, keys)
    return found


def _network(numbers: NDArray[np.uint64], base: np.uint64, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on the numbers below the square of the base."""
    left = numbers // base
    right = numbers - left * base
    for key in keys:
        drawn = right * _FACTORS[0]
        drawn += key
        drawn ^= drawn >> _HALF
        drawn *= _FACTORS[1]
        drawn >>= _HALF
        drawn *= base
        drawn >>= _HALF  # now below the base, which is below 2^32
        drawn += left
        left, right = right, np.minimum(drawn, drawn - base)  # the sum modulo the base: what is below it wraps around
    return left * base + right


@functools.lru_cache(maxsize=2)  # the loader's workers may be an epoch ahead
def _randperm(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = torch.Generator("cpu").manual_seed(mix(seed, epoch))  # whatever torch.set_default_device says
    return torch.randperm(samples, generator=generator, device="cpu").numpy()
