"""IDX, the format of MNIST: a magic number (type, number of axes), the sizes, then the values, big-endian; often gzipped.

A header is only a claim: it is checked against the file before memory is taken for it. http://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinydiff.io import write_atomic

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_BYTES = 10**9
_MAX_DEFLATE_RATIO = 1032  # no gzip file unpacks to more than this many times its size
_CHUNK = 2**20


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file, gzipped or not, as a new array in native byte order, of the file's shape and type.

    Raises FileNotFoundError, or ValueError for a file that is not IDX, that is cut off or too long, or that claims
    more than its bytes can hold or than `MAX_BYTES`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if zipped:
                with gzip.open(file) as unzipped:
                    return _read(path, unzipped, size * _MAX_DEFLATE_RATIO)
            return _read(path, file, size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); copy or download it again") from error


def _read(path: Path, stream: BinaryIO | gzip.GzipFile, most: int) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in DTYPES:
        raise ValueError(f"{path} is not an IDX file: it starts with {magic.hex(' ') or 'nothing'}, not 00 00 and a type")
    dtype, ndim = np.dtype(DTYPES[magic[2]]), magic[3]
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise ValueError(f"{path} is cut off in its header: {ndim} sizes announced, {len(sizes)} bytes left; download it again")
    shape = struct.unpack(f">{ndim}I", sizes)
    count = math.prod(shape) * dtype.itemsize
    if count > MAX_BYTES or ndim > 64:  # NumPy has no more than 64 axes
        raise ValueError(f"{path} claims shape {_short(shape)}, {count} bytes; at most {MAX_BYTES} are read")
    if count > most:
        raise ValueError(f"{path} claims shape {_short(shape)}, {count} bytes, more than the file can hold; download it again")
    values = bytearray()
    while len(values) <= count and (chunk := stream.read(min(_CHUNK, count + 1 - len(values)))):
        values += chunk
    if len(values) != count:
        holds = "more" if len(values) > count else f"only {len(values)}"
        raise ValueError(f"{path} claims shape {_short(shape)}, {count} bytes, but holds {holds}; download it again")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _short(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape[:8])) + (" × …" if len(shape) > 8 else "") or "()"


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Write an array as IDX, gzipped when the name ends in .gz, atomically; equal arrays give equal bytes.

    Raises TypeError for a dtype that IDX has no number for.
    """
    codes = [code for code, name in DTYPES.items() if np.dtype(name).newbyteorder("=") == array.dtype.newbyteorder("=")]
    if not codes:
        names = ", ".join(np.dtype(name).name for name in DTYPES.values())
        raise TypeError(f"IDX has no {array.dtype}; use one of {names}")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, codes[0], array.ndim, *array.shape)
    data = header + array.astype(DTYPES[codes[0]]).tobytes()
    write_atomic(path, gzip.compress(data, compresslevel=9, mtime=0) if Path(path).suffix == ".gz" else data)
