"""Secret random draws: uniform numbers, the units that a step sees, the records of a unit.

All randomness that a guarantee of privacy rests on comes from here, and thereby from
ChaCha20 under a seed of the operating system. This module must not know of gradients.
"""

import hashlib
import json
import os
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.keystream import KEYSTREAM_WORD, SEED_BYTES, Keystream

CHUNK: Final = 16 * 1024
"""Numbers drawn at once: few calls, and the buffers stay in the second-level cache."""

_WORD: Final = np.dtype("<u8")

# ChaCha20 counts blocks in 32 bits and `cryptography` refuses to go on after 256 GiB,
# some 14,000 steps of a large adapter. The next key is drawn from the stream long before.
_WORDS_OF_A_KEY = 2**27

_RATE_BITS = 53


class Uniforms:
    """Uniform numbers from a keystream, under a new key after each 2^27 of them (1 GiB).

    ``reproducible`` says that the seed is known: nothing drawn from it protects anyone.
    """

    def __init__(self, stream: Keystream, *, reproducible: bool) -> None:
        self.reproducible: Final = reproducible
        self._stream = stream
        self._left = _WORDS_OF_A_KEY
        self._process = os.getpid()
        self._buffer = np.empty(CHUNK, _WORD)

    def words(self, size: int) -> NDArray[np.uint64]:
        """Return uniform uint64 words (size,), valid until the next draw; at most ``CHUNK``.

        Raises ``PrivacyError`` in a forked process: it would draw what its parent draws,
        and the difference of two results would hold no noise.
        """
        self._require_own_process()
        if size > self._left:
            self.renew()
        self._left -= size
        words = self._buffer[:size]
        self._stream.fill(words.view(KEYSTREAM_WORD))
        return words

    def fill_open(self, out: NDArray[np.float64]) -> None:
        """Fill with uniforms in (0, 1): the odd multiples of 2^-53, alike under x -> 1 - x."""
        words = self.words(out.size)
        words >>= np.uint64(12)
        # As signed integers, to which and from which processors convert faster.
        np.copyto(out, words.view("<i8"))
        out += 0.5
        out *= 2.0**-52

    def fill_refined(self, out: NDArray[np.float64]) -> None:
        """Fill with uniforms in (0, 1] whose logarithm is exact in the tail too.

        A number is 64 bits over 2^64; one in 4096, those below 2^-12, get 64 bits more.
        So neighbouring numbers are at most a factor 1 + 2^-52 apart down to 2^-76, and
        the least is 2^-128, where plain 53-bit uniforms would end at 2^-53.
        """
        words = self.words(out.size)
        np.copyto(out, words, casting="unsafe")
        small = np.flatnonzero(words < np.uint64(2**52))
        if small.size:
            more = self.words(small.size).astype(np.float64)
            more += 1.0
            out[small] += more * 2.0**-64
        out *= 2.0**-64

    def renew(self) -> bytes:
        """Go on under a new key, drawn from the stream, and return it.

        Raises ``PrivacyError`` in a forked process, as ``words`` does.
        """
        self._require_own_process()
        seed = np.empty(SEED_BYTES // KEYSTREAM_WORD.itemsize, KEYSTREAM_WORD)
        self._stream.fill(seed)
        key = seed.tobytes()
        self._stream = Keystream(key)
        self._left = _WORDS_OF_A_KEY
        return key

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise PrivacyError(
                "random numbers for privacy were asked for in a forked process; "
                "make the noise or the sampler in the process that uses it"
            )


class SecretDraws:
    """Base of all that draws for privacy: a stream that nobody else has, unless ``seeded``."""

    def __init__(self) -> None:
        self._uniforms = Uniforms(Keystream.fresh(), reproducible=False)

    @classmethod
    def seeded(cls, seed: int, *names: str | int) -> Self:
        """Return draws that anyone can repeat, for tests and simulations only.

        **Not private**: who knows the seed subtracts the noise. Each class, seed and
        sequence of names (clinic, round, purpose) has a stream of its own. The same
        ones must not be used twice in a run: equal noise cancels.
        """
        named = json.dumps(["fedpeft/privacy", cls.__name__, seed, *names]).encode()
        draws = cls()
        draws._uniforms = Uniforms(Keystream(hashlib.sha256(named).digest()), reproducible=True)
        return draws

    @classmethod
    def made(cls, test_seed: int | None, *names: str | int) -> Self:
        """Return secret draws; with a seed, those of :meth:`seeded`."""
        return cls() if test_seed is None else cls.seeded(test_seed, *names)

    @property
    def reproducible(self) -> bool:
        """Whether the seed is known, so that the run must be marked as not private."""
        return self._uniforms.reproducible

    def renew(self) -> bytes:
        """Draw under a new key of 32 bytes from now on, and return it.

        **Secret**: who has it knows all that is drawn later. Of what was drawn before it
        tells nothing, as the stream does not run backwards.
        """
        return self._uniforms.renew()

    def go_on(self, key: bytes) -> None:
        """Draw what was drawn after :meth:`renew` had returned ``key``.

        **The same noise on two results that others see cancels.** Only what never left
        this machine may be computed again.
        """
        self._uniforms = Uniforms(Keystream(key), reproducible=self.reproducible)


class PoissonSampler(SecretDraws):
    """Draws Poisson samples of units (records or patients), and subsets of fixed size."""

    def sample(self, units: int, rate: float) -> NDArray[np.int64]:
        """Return the indices of a Poisson sample of ``units`` units, int64, ascending.

        *Formal guarantee*: each unit is in the sample with probability
        floor(rate * 2^53) / 2^53, independently of the others and of earlier samples.
        That is ``rate`` or less than 2^-53 below it, never above; the privacy loss of a
        step does not decrease with the rate, so accounting ``rate`` is right. The size
        varies from sample to sample, and **an empty sample must be used like any
        other**: its step takes place and gets noise. A fixed number of units, or a
        shuffled pass over them, has not this guarantee (Chua et al. 2024, "How private
        are DP-SGD implementations?").

        Raises ``PrivacyError`` unless there is a unit and ``rate`` is in (0, 1].
        """
        if units < 1 or not 0.0 < rate <= 1.0:
            raise PrivacyError(
                f"no Poisson sample can be drawn from {units} units with rate {rate}; "
                "it takes at least one unit and a rate above 0, at most 1"
            )
        bound = np.uint64(int(rate * 2.0**_RATE_BITS))
        drawn: list[NDArray[np.int64]] = []
        for start in range(0, units, CHUNK):
            words = self._uniforms.words(min(CHUNK, units - start))
            words >>= np.uint64(64 - _RATE_BITS)
            drawn.append(np.flatnonzero(words < bound).astype(np.int64) + start)
        return np.concatenate(drawn)

    def choose(self, items: int, most: int) -> NDArray[np.int64]:
        """Return the indices of at most ``most`` of ``items`` items, int64, ascending.

        All items if they are no more than ``most``, else a subset of that size, each
        such subset with the same probability: those with the least of distinct 64-bit
        keys. Keys are drawn again in the improbable case that two are equal.

        Raises ``PrivacyError`` if ``items`` is negative or ``most`` below 1.
        """
        if items < 0 or most < 1:
            raise PrivacyError(f"{most} of {items} records cannot be chosen; choose at least one")
        if items <= most:
            return np.arange(items, dtype=np.int64)
        while True:
            keys = np.concatenate(
                [
                    self._uniforms.words(min(CHUNK, items - start)).copy()
                    for start in range(0, items, CHUNK)
                ]
            )
            order = np.argsort(keys)
            if np.all(np.diff(keys[order]) > 0):
                return np.sort(order[:most]).astype(np.int64)
