"""Private randomness: AES-256-CTR keystreams, one for each use, keyed by the operating system.

Patient sampling, record choice and noise never share a generator, and none is derived from a run's
seed: two sites, or two runs, of the same seed have nothing in common (measured elsewhere: with
`torch.manual_seed` two sites draw identical noise, which their difference removes). Keys live in
memory only.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

_RARE = 2.0**32  # in units of 2^-53: uniforms of 2^-21 and less
_PAIRS = 1 << 15  # Gaussian pairs made at a time: every buffer stays in the cache
BLOCK = 2 * _PAIRS  # Parts of this length get the numbers that the whole would get


class Keystream:
    """Uniform and Gaussian numbers from the keystream of AES-256 in counter mode.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(8 * BLOCK)
        # Some releases of `cryptography` ask for a spare block behind the output.
        self._bytes = np.empty(8 * BLOCK + 16, dtype=np.uint8)
        self._words = torch.empty(BLOCK, dtype=torch.float64)
        self._sines = torch.empty(_PAIRS, dtype=torch.float64)

    def _integers(self, count: int) -> Tensor:
        """[count] int64, uniform on [-2^52, 2^52); a view that the next draw overwrites."""
        self._cipher.update_into(memoryview(self._zeros)[: 8 * count], self._bytes)  # type: ignore[arg-type]
        words = torch.from_numpy(self._bytes[: 8 * count].view(np.int64))
        return words.bitwise_right_shift_(11)

    def uniforms(self, count: int) -> np.ndarray:
        """[count] float64, the multiples of 2^-53 in (0, 1]."""
        out = np.empty(count)
        for start in range(0, count, BLOCK):
            some = min(BLOCK, count - start)
            out[start : start + some] = self._integers(some).numpy()
        out += 2.0**52 + 1
        out *= 2.0**-53
        return out

    def add_gaussians_(self, out: Tensor, std: float) -> None:
        """Add independent N(0, std²) to every element of `out`, a contiguous float64 tensor.

        Box-Muller in float64, both outputs used. Uniforms near 0 make the tail, where 53 bits give
        few radii: beyond 7 std they lie further apart than the grid to which a released sum is
        rounded, and a sum off every ring would betray itself (once in 10^11 draws, too often for
        delta). Those below 2^-21 therefore get 53 bits more: the tail ends at 12.1 std.
        """
        flat = out.view(-1)
        for some in flat.split(BLOCK):
            pairs = (some.numel() + 1) // 2
            words = self._words[: 2 * pairs].copy_(self._integers(2 * pairs))
            radius = words[:pairs].add_(2.0**52 + 1)
            if radius.numpy().min() <= _RARE:  # a third of the time of torch's
                low = (radius <= _RARE).nonzero()[:, 0]
                radius[low] += torch.from_numpy(self.uniforms(len(low))) - 1
            radius.mul_(2.0**-53).log_().mul_(-2.0).sqrt_().mul_(std)
            angle = words[pairs:].mul_(math.pi * 2.0**-52)
            sine = torch.sin(angle, out=self._sines[:pairs]).mul_(radius)
            cosine = angle.cos_().mul_(radius)
            some[:pairs].add_(cosine.to(out.device))
            some[pairs:].add_(sine[: some.numel() - pairs].to(out.device))


class Entropy:
    """The three generators of one training engine.

    Attributes:
        patients: Which patients enter a step.
        records: Which of a patient's records are used.
        noise: What is added to the clipped sum.
        simulated: True if derived from a seed. Whoever keeps a ledger must record it there: such a
            run is reproducible and therefore not private.
    """

    def __init__(self) -> None:
        self.simulated = False
        self.patients = Keystream(os.urandom(32))
        self.records = Keystream(os.urandom(32))
        self.noise = Keystream(os.urandom(32))

    @classmethod
    def seeded(cls, seed: int | str) -> Entropy:
        """Reproducible entropy, for tests and for runs without privacy only."""

        def derive(use: str) -> Keystream:
            return Keystream(hashlib.sha256(f"fedward entropy\0{seed}\0{use}".encode()).digest())

        entropy = cls.__new__(cls)
        entropy.simulated = True
        entropy.patients = derive("patients")
        entropy.records = derive("records")
        entropy.noise = derive("noise")
        return entropy
