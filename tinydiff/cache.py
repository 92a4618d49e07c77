"""Arrays that are costly to make and easy to make again: kept on disk, checked when read, and made anew if anything is wrong.

TINYDIFF_CACHE_DIR moves the folder; where it can't be written, everything works and is only slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from tinydiff import io


def folder() -> Path:
    """Where what can be made again is kept."""
    return Path(os.environ.get("TINYDIFF_CACHE_DIR") or platformdirs.user_cache_dir("tinydiff"))


def cached(name: str, key: Mapping[str, Any], make: Callable[[], io.Weights]) -> io.Weights:
    """What `make()` gives, from the cache if it has been made before with this `key`.

    Args:
        name: begins the file's name; one file is kept for each `key`.
        key: all that the result depends on, as JSON values: versions, sizes, hashes of what it is made from.

    A file that is damaged, or was made with another key, is replaced.
    """
    made_with = json.dumps(key, sort_keys=True)
    path = folder() / f"{name}-{hashlib.sha256(made_with.encode()).hexdigest()[:12]}.safetensors"
    with contextlib.suppress(OSError, ValueError):
        arrays = io.load_weights(path)
        if io.load_metadata(path) == {"made_with": made_with, "hash": io.hash_weights(arrays)}:
            return arrays
    arrays = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        io.save_weights(path, arrays, {"made_with": made_with, "hash": io.hash_weights(arrays)})
    return arrays
