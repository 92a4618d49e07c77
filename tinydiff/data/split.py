"""Which part of the data is kept out of training, where the data itself doesn't say: by a hash of what a thing is called."""

from __future__ import annotations

import hashlib


def held_out(key: str, share: float = 0.1) -> bool:
    """Whether what goes by `key` belongs to the test: about `share` of all keys do, the same ones everywhere and for good.

    The first eight bytes of the key's SHA-256, as a fraction of 2⁶⁴, are below `share`.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < share * 2**64
