"""Download whole data sets, checked. Nothing else in the package opens a connection."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinydiff.io import write_atomic

MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
}

# Of the unpacked files, so that a mirror may pack them anew. Fashion-MNIST's are known only as MD5, which finds damage
# and old versions but not an attacker.
CHECKSUMS = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion": {
        "train-images-idx3-ubyte.gz": "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte.gz": "md5:9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte.gz": "md5:8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte.gz": "md5:15d484375f8d13e6eb1aabb0c3f46965",
    },
}
TIMEOUT_SECONDS = 30
_MAX_BYTES = 2**26  # the largest of these files unpacks to 47,040,016


def fetch(
    name: str, folder: str | Path, base_url: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Download the four files of "mnist" or "fashion" into `folder`, made if need be; files already there and whole are kept.

    Args:
        base_url: download from below this http(s) address instead of from the mirrors.
        say: called with a line for each file.

    Returns the paths. Raises ValueError for an unknown name or a file with a wrong checksum, OSError when no mirror answers;
    a file is there whole and right or not at all.
    """
    if name not in CHECKSUMS:
        raise ValueError(f"unknown data set {name!r}; can fetch {' and '.join(CHECKSUMS)}")
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise ValueError(f"{base_url!r} is not an address; it must start with http:// or https://")
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}") from error
    mirrors = (base_url.rstrip("/") + "/",) if base_url else MIRRORS[name]
    paths = []
    for file, checksum in CHECKSUMS[name].items():
        path = folder / file
        if path.is_file() and _digest(path.read_bytes(), checksum) == checksum:
            say(f"{path} is there already")
        else:
            _download([mirror + file for mirror in mirrors], path, checksum)
            say(f"{path} downloaded, checksum right")
        paths.append(path)
    return paths


def _download(urls: list[str], path: Path, checksum: str) -> None:
    import pooch  # here, because it brings in an HTTP client that nothing else needs
    import requests

    get = pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS)
    failures = []
    arrived = False
    for url in urls:
        body = _Body()  # in memory: nothing reaches the disk unchecked
        try:
            get(url, body, None)
        except (requests.RequestException, OverflowError) as error:
            failures.append(f"{url}: {_reason(error)}")
            continue
        found = _digest(body.getvalue(), checksum)
        if found == checksum:
            write_atomic(path, body.getvalue())
            return
        arrived = True
        failures.append(f"{url}: wrong content, {found} instead of {checksum}")
    advice = "try again or give another address (--base-url)"
    if arrived:
        raise ValueError(f"{path.name} did not arrive as it should ({'; '.join(failures)}); {advice}")
    raise OSError(f"cannot download {path.name} ({'; '.join(failures)}); {advice}")


class _Body(io.BytesIO):
    """What a server sends, up to a limit that the right file stays far below."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > _MAX_BYTES:
            raise OverflowError(f"more than {_MAX_BYTES} bytes arrived")
        return super().write(data)


def _digest(data: bytes, checksum: str) -> str:
    """The checksum of the unpacked `data`, by the algorithm that `checksum` names."""
    try:
        with gzip.open(io.BytesIO(data)) as unzipped:
            unpacked = unzipped.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error):
        return "a damaged gzip file"
    algorithm = checksum.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, unpacked, usedforsecurity=False).hexdigest()}"


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return f"no answer in {TIMEOUT_SECONDS} seconds"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)
