"""ChaCha20 keystreams (RFC 8439): uniform words under a secret seed.

Masks are made of them, and all randomness that protects anyone. This module must
not know what the words are for.
"""

import secrets
from typing import Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fedpeft.errors import BadVector

SEED_BYTES = 32

CHUNK: Final = 32 * 1024
"""Words handled at once, 128 KiB: vector, keystream and zeros stay in the second-level cache."""

# Counter and nonce in one, as `cryptography` takes them. A fixed nonce is safe only
# because each seed is used for a single stream and then thrown away.
_NONCE = bytes(16)

KEYSTREAM_WORD: Final = np.dtype("<u4")
"""Little-endian whatever the machine, so that both ends of a mask read the same words."""

_ZEROS = memoryview(bytes(4 * CHUNK))

Words: TypeAlias = NDArray[np.uint32]


class Keystream:
    """The uniform uint32 words that a seed of 32 bytes stands for, in order.

    A seed must never be used for a second purpose: two masks of one seed cancel.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise BadVector(f"a mask cannot be made from a seed of {len(seed)} bytes; it takes 32")
        self._encryptor = Cipher(algorithms.ChaCha20(seed, _NONCE), mode=None).encryptor()

    @classmethod
    def fresh(cls) -> "Keystream":
        """Return a stream that nobody else has, for randomness rather than masks."""
        return cls(secrets.token_bytes(SEED_BYTES))

    def fill(self, words: Words) -> None:
        """Write the next words of the stream to a contiguous array of ``KEYSTREAM_WORD``."""
        for start in range(0, words.size, CHUNK):
            part = words[start : start + CHUNK]
            self._encryptor.update_into(_ZEROS[: part.nbytes], part.view(np.uint8).data)
