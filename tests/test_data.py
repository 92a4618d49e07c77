"""Data: IDX by hand and back, the shipped digits, folders of pictures, the order of batches, downloads from a local server."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tinydiff import data
from tinydiff.data import download, idx

IDX_DTYPES = ["uint8", "int8", "int16", "int32", "float32", "float64"]
slow_files = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def idx_bytes(kind: int, sizes: tuple[int, ...], values: bytes) -> bytes:
    """The format by hand."""
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, len(sizes), *sizes) + values


# --------------------------------------------------------------------------------------------------------------------- IDX


@given(hnp.arrays(st.sampled_from(IDX_DTYPES), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)), st.booleans())
@slow_files
def test_idx_round_trip(tmp_path: Path, array: np.ndarray, zipped: bool) -> None:
    path = tmp_path / ("a.gz" if zipped else "a")
    data.write_idx(path, array)
    back = data.read_idx(path)
    assert back.dtype == array.dtype
    assert back.dtype.isnative
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_is_read_as_the_format_says(tmp_path: Path, pack: type[bytes]) -> None:
    (tmp_path / "a").write_bytes(pack(idx_bytes(0x0B, (2, 2), struct.pack(">4h", 1, -2, 300, -400))))
    back = data.read_idx(tmp_path / "a")
    assert back.tolist() == [[1, -2], [300, -400]]
    assert back.dtype == np.int16
    back += 1  # the caller's own


def test_idx_is_written_as_the_format_says_and_alike_each_time(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    data.write_idx(tmp_path / "a", array.T)
    assert (tmp_path / "a").read_bytes() == idx_bytes(0x0C, (3, 2), struct.pack(">6i", 0, 3, 1, 4, 2, 5))
    data.write_idx(tmp_path / "a.gz", array)
    first = (tmp_path / "a.gz").read_bytes()
    assert gzip.decompress(first) == idx_bytes(0x0C, (2, 3), struct.pack(">6i", *range(6)))
    data.write_idx(tmp_path / "b.gz", array)
    assert (tmp_path / "b.gz").read_bytes() == first
    with pytest.raises(TypeError, match="IDX has no int64; use one of uint8, int8"):
        data.write_idx(tmp_path / "c", np.zeros(2, np.int64))


WHOLE = idx_bytes(8, (3, 4), bytes(12))
BAD_IDX = {
    "empty": (b"", "starts with nothing"),
    "text": (b"hello", "starts with 68 65 6c 6c"),
    "unknown type": (idx_bytes(0x0A, (1,), bytes(1)), "starts with 00 00 0a 01"),
    "cut off in the header": (WHOLE[:9], "cut off in its header"),
    "cut off": (WHOLE[:-1], "claims shape 3 × 4, 12 bytes"),
    "too long": (WHOLE + b"\0", "but holds more"),
    "a million pictures": (idx_bytes(8, (10**6, 28, 28), bytes(784)), "more than the file can hold"),
    "too large": (idx_bytes(8, (2**20, 2**20), b""), "at most 1000000000 are read"),
    "sizes that overflow": (idx_bytes(8, (2**32 - 1,) * 9, b""), "at most 1000000000 are read"),
    "too many axes": (idx_bytes(8, (1,) * 65, bytes(1)), "claims shape 1 × 1"),
    "cut off, zipped": (gzip.compress(WHOLE)[:-9], "damaged gzip"),
    "wrong checksum, zipped": (gzip.compress(WHOLE)[:-8] + bytes(8), "damaged gzip"),
    "cut off and zipped": (gzip.compress(WHOLE[:-1]), "but holds only 11"),
    "too long, zipped": (gzip.compress(WHOLE + bytes(5)), "but holds more"),
    "zipped bomb": (gzip.compress(idx_bytes(8, (9,), bytes(10**7))), "but holds more"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_IDX.values(), ids=BAD_IDX.keys())
def test_bad_idx_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        data.read_idx(tmp_path / "a.idx")
    assert "a.idx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_memory_is_not_taken_for_a_claim(tmp_path: Path, pack: type[bytes]) -> None:
    # 999 million bytes claimed within what 2 MB could unpack to if zipped: only what is there may be held
    content = np.random.default_rng(0).bytes(2_000_000)
    (tmp_path / "a").write_bytes(pack(idx_bytes(8, (999, 1000, 1000), content)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="999000000 bytes"):
        data.read_idx(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@given(st.data(), st.booleans())
@settings(slow_files, max_examples=200)
def test_corrupt_idx_is_read_or_refused_never_worse(tmp_path: Path, draw: st.DataObject, zipped: bool) -> None:
    content = bytearray(gzip.compress(WHOLE) if zipped else WHOLE)
    for place in draw.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = draw.draw(st.integers(0, 255))
    (tmp_path / "a.idx").write_bytes(content[: draw.draw(st.integers(0, len(content)))] if draw.draw(st.booleans()) else content)
    try:
        data.read_idx(tmp_path / "a.idx")
    except ValueError as error:
        assert "a.idx" in str(error)


# ---------------------------------------------------------------------------------------------------------- shipped digits


def test_the_shipped_digits_are_complete_balanced_and_small() -> None:
    train, test = data.load("digits"), data.load("digits", "test")
    assert train.images.shape == (10_000, 28, 28, 1)
    assert test.images.shape == (1_000, 28, 28, 1)
    assert train.labels is not None
    assert test.labels is not None
    assert np.bincount(train.labels).tolist() == [1000] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.num_classes == 10
    assert sum(path.stat().st_size for path in data.SHIPPED.glob("digits-*.gz")) < 2_000_000
    assert (data.SHIPPED / "digits-LICENSE.md").is_file()
    pictures = {picture.tobytes() for picture in train.images}
    assert len(pictures) == 10_000
    assert not any(picture.tobytes() in pictures for picture in test.images)


def test_the_shipped_labels_belong_to_their_pictures() -> None:
    train, test = data.load("digits"), data.load("digits", "test")
    means = np.stack([train.images[train.labels == digit].reshape(-1, 784).mean(axis=0) for digit in range(10)])
    distance = ((test.images.reshape(-1, 1, 784) - means) ** 2).sum(axis=2)
    assert (distance.argmin(axis=1) == test.labels).mean() > 0.75  # chance is 0.1


def write_mnist(folder: Path, train: int = 40, test: int = 20, classes: int = 10) -> None:
    """A folder of four IDX files; every pixel of picture i is i modulo 256, its label i modulo `classes`."""
    folder.mkdir(exist_ok=True)
    for stem, n in (("train", train), ("t10k", test)):
        order = np.arange(n, dtype=np.uint8)
        data.write_idx(folder / f"{stem}-images-idx3-ubyte.gz", np.broadcast_to(order[:, None, None], (n, 4, 4)).copy())
        data.write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", order % classes)


def test_the_script_that_makes_the_digits_chooses_evenly(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "make_digits.py"
    if not script.is_file():
        pytest.skip("the scripts are in the repository only")
    generator = np.random.default_rng(0)
    for stem, n in (("train", 30_000), ("t10k", 3_000)):
        labels = generator.integers(0, 10, n).astype(np.uint8)
        pictures = np.stack([labels, np.arange(n) // 256, np.arange(n) % 256, labels], axis=1).astype(np.uint8).reshape(n, 2, 2)
        data.write_idx(tmp_path / f"{stem}-images-idx3-ubyte", pictures)
        data.write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", labels)
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, script, tmp_path, "--out", tmp_path / "out"], check=True)
    for stem, n, per_class in (("train", 30_000, 1000), ("t10k", 3_000, 100)):
        pictures = data.read_idx(tmp_path / "out" / f"digits-{stem}-images-idx3-ubyte.gz").reshape(-1, 4).astype(int)
        labels = data.read_idx(tmp_path / "out" / f"digits-{stem}-labels-idx1-ubyte.gz")
        places = pictures[:, 1] * 256 + pictures[:, 2]
        assert np.array_equal(pictures[:, 0], labels)
        assert np.bincount(labels).tolist() == [per_class] * 10
        assert (np.diff(places) > 0).all()
        assert abs((places < n / 2).mean() - 0.5) < 0.02


# -------------------------------------------------------------------------------------------------------------------- load


def test_mnist_and_fashion_folders(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    train, test = data.load(f"mnist:{tmp_path}"), data.load(f"fashion:{tmp_path}", split="test")
    assert (len(train), len(test)) == (40, 20)
    assert train.images[7].ravel().tolist() == [7] * 16
    assert train.labels is not None
    assert train.labels[17] == 7
    assert train.class_names[7] == "7"
    assert test.class_names[7] == "Sneaker"
    unzipped = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(unzipped)
    assert np.array_equal(data.load(f"mnist:{tmp_path}").images, train.images)


def test_idx_folders_that_do_not_fit_together(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            data.load(f"mnist:{tmp_path}")

    write_mnist(tmp_path)
    data.write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(39, np.uint8))
    refused(r"train-labels.* needs uint8 \(40,\)")
    data.write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.full(40, 10, np.uint8))
    refused("labels run from 10 to 10, but there are 10 classes")
    data.write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((40, 4), np.uint8))
    refused(r"pictures are uint8 \(N, H, W\)")
    write_mnist(tmp_path, train=0)
    refused("holds no pictures")
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz in"):
        data.load(f"mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("digit", "unknown data 'digit': did you mean 'digits'"),
        ("Minst:/x", "did you mean 'mnist'"),
        ("cifar", "Known: digits, .*mnist:DIR, fashion:DIR or folder:DIR"),
        ("", "unknown data ''"),
        ("mnist", "write mnist:DIR"),
        ("folder:", "write folder:DIR"),
        ("digits:x", "unknown data 'digits:x'"),
    ],
)
def test_unknown_data_is_answered_with_what_is_known(spec: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        data.load(spec)


def test_digits_come_at_other_sizes() -> None:
    plain, large = data.load("digits", "test"), data.load("digits", "test", 56)
    assert large.images.shape == (len(plain), 56, 56, 1)
    assert np.array_equal(large.labels, plain.labels)
    averaged = large.images.reshape(len(plain), 28, 2, 28, 2, 1).mean((2, 4))
    assert np.abs(averaged - plain.images).mean() < 4  # the same digits, in their places


def test_other_arguments_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.load(f"folder:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="did you mean folder:"):
        data.load(str(tmp_path))
    with pytest.raises(ValueError, match='unknown split \'val\'; use "train" or "test"'):
        data.load("digits", "val")
    with pytest.raises(ValueError, match="size=0: pictures are at least 1 pixel"):
        data.load("digits", size=0)
    with pytest.raises(ValueError, match="no pictures in"):
        data.load(f"folder:{tmp_path}")


def save_picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (value, value, value)).save(path)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for value in range(20):
        save_picture(tmp_path / f"{value:02}.png", value)
    (tmp_path / "notes.txt").touch()
    save_picture(tmp_path / ".thumbnails" / "x.png", 0)
    train, test = data.load(f"folder:{tmp_path}", size=8), data.load(f"folder:{tmp_path}", "test", size=8)
    assert train.images.shape == (18, 8, 8, 3)
    assert train.images[:, 0, 0, 0].tolist() == [*range(9), *range(10, 19)]
    assert test.images[:, 0, 0, 0].tolist() == [9, 19]
    assert (train.labels, train.num_classes, train.notes) == (None, 0, ())


def test_subfolders_are_classes_and_splits(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 100)):
        save_picture(tmp_path / split / "dog" / "a.png", first + 1)
        save_picture(tmp_path / split / "cat" / "deep" / "b.JPG", first + 2)
    train, test = data.load(f"folder:{tmp_path}"), data.load(f"folder:{tmp_path}", "test")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]
    assert train.images.shape == (2, 64, 64, 3)
    assert test.images[:, 0, 0, 0].tolist() == [102, 101]
    save_picture(tmp_path / "train" / "loose.png", 5)
    assert data.load(f"folder:{tmp_path}").labels is None


def test_broken_pictures_are_counted_and_said(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    (tmp_path / "c.jpg").write_bytes(b"")
    loaded = data.load(f"folder:{tmp_path}")
    assert len(loaded) == 1
    assert len(loaded.notes) == 1
    assert loaded.notes[0].startswith("2 of 3 pictures were skipped; the first: ")
    assert "b.png" in loaded.notes[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        data.load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="fewer than ten"):
        data.load(f"folder:{tmp_path}", "test")


# ------------------------------------------------------------------------------------------------------------------ batches


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_sees_every_sample_once(n: int, batch_size: int, seed: int, epoch: int) -> None:
    first, last = epoch * n // batch_size, -(-(epoch + 1) * n // batch_size)
    stream = np.concatenate([data.batch_indices(n, batch_size, seed, step) for step in range(first, last)])
    start = epoch * n - first * batch_size
    assert sorted(stream[start : start + n]) == list(range(n))


def test_batches_depend_on_seed_and_epoch_only() -> None:
    later = data.batch_indices(1000, 64, 5, 40)
    assert later.dtype == np.int64
    assert later.shape == (64,)
    assert np.array_equal(later, data.batch_indices(1000, 64, 5, 40))
    assert not np.array_equal(later, data.batch_indices(1000, 64, 6, 40))
    epochs = [data.batch_indices(1000, 1000, 5, step).tolist() for step in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert data.batch_indices(1000, 250, 5, 5).tolist() == epochs[1][250:500]


def test_batches_are_the_same_on_every_machine_and_version() -> None:
    # 0 … 9 sorted by ten raw words of a Philox generator of SeedSequence([0, 0]), worked out apart from the package
    assert data.batch_indices(10, 10, seed=0, step=0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_batches_of_nothing_are_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        data.batch_indices(*arguments)


# -------------------------------------------------------------------------------------------------------------------- fetch


class Server(ThreadingHTTPServer):
    """Serves `files` by path, and remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def small(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set in place of MNIST, on the server under /set/ and with its checksums; yields the folder to download to."""
    write_mnist(tmp_path / "set")
    checksums = {}
    for file in sorted((tmp_path / "set").iterdir()):
        unpacked = gzip.decompress(file.read_bytes())
        checksums[file.name] = "sha256:" + hashlib.sha256(unpacked).hexdigest()
        server.files[f"/set/{file.name}"] = gzip.compress(unpacked, 1)  # packed in another way
    monkeypatch.setitem(download.CHECKSUMS, "mnist", checksums)
    return tmp_path / "new" / "download"


def test_fetch_downloads_checks_and_keeps(server: Server, small: Path) -> None:
    said: list[str] = []
    paths = data.fetch("mnist", small, base_url=f"{server.url}/set", say=said.append)
    assert [path.name for path in paths] == list(download.CHECKSUMS["mnist"])
    assert len(data.load(f"mnist:{small}")) == 40
    assert (len(server.asked), len(said)) == (4, 4)
    paths[1].write_bytes(paths[1].read_bytes()[:-20])  # damaged: the one to be downloaded again
    data.fetch("mnist", small, base_url=f"{server.url}/set/")
    assert server.asked[4:] == [f"/set/{paths[1].name}"]
    assert len(data.load(f"mnist:{small}")) == 40


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"something else"), b"<html>busy</html>", gzip.compress(b"x" * 99)[:-9], b""],
    ids=["another file", "not gzip", "cut off", "empty"],
)
def test_wrong_content_is_refused_and_leaves_nothing(server: Server, small: Path, content: bytes) -> None:
    bad = next(iter(download.CHECKSUMS["mnist"]))
    server.files[f"/set/{bad}"] = content
    with pytest.raises(ValueError, match=f"{bad} did not arrive as it should .*--base-url") as caught:
        data.fetch("mnist", small, base_url=f"{server.url}/set")
    assert "\n" not in str(caught.value)
    assert names(small) == []


def test_an_endless_answer_is_cut_short(server: Server, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_BYTES", 50)
    with pytest.raises(OSError, match="more than 50 bytes arrived"):
        data.fetch("mnist", small, base_url=f"{server.url}/set")
    assert names(small) == []


def test_the_next_mirror_is_tried(server: Server, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrors = ("http://127.0.0.1:1/", f"{server.url}/nothing/", f"{server.url}/set/")
    monkeypatch.setitem(download.MIRRORS, "mnist", mirrors)
    data.fetch("mnist", small)
    assert len(names(small)) == 4
    monkeypatch.setitem(download.MIRRORS, "mnist", mirrors[:2])
    for file in small.iterdir():
        file.unlink()
    with pytest.raises(OSError, match=r"no connection; .* the server answers 404\)"):
        data.fetch("mnist", small)
    assert names(small) == []


def test_fetch_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'cifar'; can fetch mnist and fashion"):
        data.fetch("cifar", tmp_path)
    for address in ("ftp://x/", "file:///etc", "x"):
        with pytest.raises(ValueError, match="must start with http"):
            data.fetch("mnist", tmp_path, base_url=address)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot make the folder"):
        data.fetch("mnist", tmp_path / "file")


def test_the_largest_file_fits_the_limits() -> None:
    whole = 16 + 60_000 * 28 * 28
    assert whole < download._MAX_BYTES < idx.MAX_BYTES
