"""Files: written whole or not at all, and read as if a stranger had made them.

Weights are safetensors (through its library) and settings are JSON; nothing here unpickles. A reader that meets a bad file raises
ValueError in one line that names the file, the value and the fix; a writer that fails (a full disk, say) raises OSError, leaves
the old file as it was and nothing half-written beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tinydiff.backend import Array, to_numpy

PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
MAX_JSON_BYTES = 64 * 2**20

Weights = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------------------- whole files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well, flush it to the disk and rename it to `path`.

    After a kill at any moment `path` holds either the old bytes or the new. Raises OSError naming `path` when writing fails.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask asks for: the block may put a file of its own, less readable, here
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself survives a power cut only once the folder is flushed
            _flush(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Make `path` hold `data`, or leave it as it was and raise OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


# -------------------------------------------------------------------------------------------------------------------- JSON


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write an object as readable JSON; NumPy scalars become numbers. Raises ValueError for NaN and infinities."""
    write_atomic(path, (_dumps(path, value, indent=2) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError or, for anything but one whole JSON object, ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than settings ever need ({MAX_JSON_BYTES}): is it the file meant?"
        )
    return _loads(path, path.read_bytes())


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add one row to a JSON-lines file. A number that is not finite is written as null, for JSON has no NaN."""
    finite = {key: None if isinstance(v, (float, np.floating)) and not math.isfinite(v) else v for key, v in row.items()}
    append_line(path, _dumps(path, finite))


def append_line(path: str | Path, line: str) -> None:
    """Add one line of text to a file, made if need be."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file. A last line without its newline was cut off by a kill, and is left out."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_loads(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def _dumps(path: str | Path, value: Mapping[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path} as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} has no JSON form")


def _loads(where: str | Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}; expected an object, {{…}}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# ----------------------------------------------------------------------------------------------------------------- weights


def save_weights(path: str | Path, weights: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays, with text metadata, as a safetensors file, atomically.

    Raises TypeError for a value that is not a numeric array, ValueError for a name that the format keeps for itself.
    """
    path = Path(path)
    _refuse_pickle(path)
    arrays: Weights = {}
    for name, array in weights.items():
        if name == "__metadata__":
            raise ValueError(f"{path}: a tensor cannot be called {name!r}, where safetensors keeps its metadata; rename it")
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise TypeError(f"{path}: {name!r} is {_describe(array)}; weights are NumPy arrays of float, integer or bool")
        # The library reads the memory behind the pointer, so strides and byte order must be plain. (ascontiguousarray alone
        # would turn a 0-d array into a 1-d one.)
        arrays[name] = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    with replacing(path) as temporary:
        try:
            safetensors.numpy.save_file(arrays, temporary, dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error


def load_weights(path: str | Path) -> Weights:
    """Read a safetensors file into new arrays. Raises FileNotFoundError or ValueError (naming the file); never unpickles."""
    weights: Weights = {}
    with _open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            try:
                weights[name] = file.get_tensor(name)
            except Exception as error:  # whatever NumPy says of a dtype or a number of axes that it does not have
                dtype = file.get_slice(name).get_dtype()
                raise ValueError(
                    f"{path}: NumPy cannot hold {name!r}, a {dtype} tensor ({error}); convert it to F32 first"
                ) from error
    return weights


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the text metadata of a safetensors file; its arrays are not read."""
    with _open_weights(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _open_weights(path: str | Path) -> Iterator[Any]:
    path = Path(path)
    _refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        file = safetensors.safe_open(path, framework="np")
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}; copy or download it again") from error
    with file:
        yield file


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path}: {path.suffix} files are pickles, which can run code; use a .safetensors file instead")


def _describe(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"


def hash_weights(weights: Mapping[str, np.ndarray]) -> str:
    """Twelve hexadecimal digits of SHA-256 over names, dtypes, shapes and values: the same whatever the order or the strides."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name])
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:12]


# The axes that take the layout in memory to the published one (and, for "other", none).
_TO_DISK = {"conv": (3, 2, 0, 1), "linear": (1, 0), "other": None}  # HWIO -> OIHW, [in, out] -> [out, in]
_FROM_DISK = {"conv": (2, 3, 1, 0), "linear": (1, 0), "other": None}


def to_disk(name: str, array: Array, kind: str) -> np.ndarray:
    """A parameter's array, from any device, in the published layout.

    `kind` says which: "conv" (HWIO to OIHW), "linear" ([in, out] to [out, in]) or "other" (as it is).
    """
    return _transposed(name, to_numpy(array), kind, _TO_DISK)


def from_disk(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `to_disk`: an array from a file in the layout that this package computes with."""
    return _transposed(name, array, kind, _FROM_DISK)


def _transposed(name: str, array: np.ndarray, kind: str, layouts: Mapping[str, tuple[int, ...] | None]) -> np.ndarray:
    if kind not in layouts:
        raise ValueError(f"{name}: unknown kind of parameter {kind!r}; use one of {', '.join(layouts)}")
    axes = layouts[kind]
    if axes is None:
        return array
    if array.ndim != len(axes):
        raise ValueError(f"{name} has shape {array.shape}; a {kind} weight has {len(axes)} axes")
    return np.ascontiguousarray(array.transpose(axes))
