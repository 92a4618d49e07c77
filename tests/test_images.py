"""Pictures: exact values through PNG and GIF, settings in the metadata, and any picture read safely."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydiff import images

RED, BLUE = (255, 0, 0), (0, 0, 255)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png_bytes(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file by hand, for headers that lie."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------------------ values


def test_to_uint8_rounds_and_clips() -> None:
    x = np.array([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0, np.inf, -np.inf], np.float32)
    assert images.to_uint8(x).tolist() == [0, 0, 0, 128, 191, 255, 255, 255, 0]
    with pytest.raises(ValueError, match="1 of 2 pixel values are NaN"):
        images.to_uint8(np.array([0.0, np.nan]))


def test_uint8_to_network_and_back_is_exact() -> None:
    every = np.arange(256, dtype=np.uint8)
    x = images.from_uint8(every)
    assert x.dtype == np.float32
    assert (x[0], x[255]) == (-1, 1)
    assert np.array_equal(images.to_uint8(x), every)
    with pytest.raises(TypeError, match="uint8"):
        images.from_uint8(x)


def test_grid_places_each_picture_and_fills_the_rest() -> None:
    pictures = np.stack([np.full((2, 3, 1), value, np.uint8) for value in (10, 20, 30)])
    sheet = images.grid(pictures, columns=2, gap=1, background=9)
    assert sheet[..., 0].tolist() == [
        [10, 10, 10, 9, 20, 20, 20],
        [10, 10, 10, 9, 20, 20, 20],
        [9, 9, 9, 9, 9, 9, 9],
        [30, 30, 30, 9, 9, 9, 9],
        [30, 30, 30, 9, 9, 9, 9],
    ]
    assert images.grid(pictures, columns=2, gap=0, enlarged=4).shape == (16, 24, 1)
    assert images.grid(noise(9, 4, 4, 3), gap=0).shape == (12, 12, 3)


def test_enlarge_repeats_pixels() -> None:
    assert images.enlarge(np.array([[1, 2]], np.uint8), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    batch = noise(2, 3, 4, 3)
    assert np.array_equal(images.enlarge(batch, 3)[1, 2::3, 1::3], batch[1])
    for factor in (0, -1, 1.5):
        with pytest.raises(ValueError, match="whole number"):
            images.enlarge(batch, factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 4, 4, 1), (4, 4, 1), (2, 0, 4, 1)])
def test_grid_of_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        images.grid(np.zeros(shape, np.uint8))


# ------------------------------------------------------------------------------------------------------------ PNG and GIF


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_png_keeps_every_value(tmp_path: Path, shape: tuple[int, ...]) -> None:
    picture = noise(*shape)
    images.save_png(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as file:
        assert np.array_equal(np.asarray(file), picture.squeeze())
    images.save_png(tmp_path / "a.png", picture, enlarged=3)
    with Image.open(tmp_path / "a.png") as file:
        assert file.size == (21, 15)
        assert np.array_equal(np.asarray(file)[1::3, 2::3], picture.squeeze())


def test_png_metadata(tmp_path: Path) -> None:
    settings_used = {"seed": 3, "sampler": "ddim", "guidance": 2.5, "prompt": "Straße ☂\nline", "seeds": [0, 1]}
    images.save_png(tmp_path / "a.png", noise(4, 4), settings_used)
    read = images.read_png_metadata(tmp_path / "a.png")
    assert read == {"seed": "3", "sampler": "ddim", "guidance": "2.5", "prompt": "Straße ☂\nline", "seeds": "[0, 1]"}
    assert json.loads(read["seeds"]) == [0, 1]
    for key in ("", " a", "a" * 80, "é"):
        with pytest.raises(ValueError, match="metadata key"):
            images.save_png(tmp_path / "b.png", noise(4, 4), {key: "x"})
    with pytest.raises(ValueError, match="NUL"):
        images.save_png(tmp_path / "b.png", noise(4, 4), {"a": "x\0"})
    assert not (tmp_path / "b.png").exists()
    with pytest.raises(FileNotFoundError):
        images.read_png_metadata(tmp_path / "b.png")


@pytest.mark.parametrize("shape", [(0, 4), (4, 4, 2), (4, 4, 4), (1, 4, 4, 3), (4,)])
def test_shapes_that_are_no_picture(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"picture"):
        images.save_png(tmp_path / "a.png", np.zeros(shape, np.uint8))
    with pytest.raises(TypeError, match="float32"):
        images.save_png(tmp_path / "a.png", np.zeros((4, 4), np.float32))


def test_gif_keeps_grey_frames_and_their_time(tmp_path: Path) -> None:
    frames = noise(4, 6, 5, 1)
    images.save_gif(tmp_path / "a.gif", frames, 0.1, hold=1.0, enlarged=2)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 4
        assert film.info["loop"] == 0
        durations = []
        for index, frame in enumerate(frames):
            film.seek(index)
            durations.append(film.info["duration"])
            assert np.array_equal(np.asarray(film.convert("L"))[::2, ::2], frame[..., 0])
    assert durations == [100, 100, 100, 1100]


def test_films_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        images.save_gif(tmp_path / "a.gif", [], 0.1)
    with pytest.raises(ValueError, match="one shape"):
        images.save_gif(tmp_path / "a.gif", [noise(4, 4), noise(4, 5)], 0.1)
    for seconds in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ValueError, match=r"0\.02 to 600 seconds"):
            images.save_gif(tmp_path / "a.gif", [noise(4, 4)], seconds)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- reading


def test_read_image_modes(tmp_path: Path) -> None:
    grey, colour = noise(6, 8), noise(6, 8, 3)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(colour).save(tmp_path / "colour.bmp")
    assert np.array_equal(images.read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(images.read_image(tmp_path / "grey.png", channels=1), grey[..., None])
    for name in ("colour.png", "colour.bmp"):
        assert np.array_equal(images.read_image(tmp_path / name), colour)


def test_transparency_shows_the_background(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = RED
    rgba[0, :, 3] = (0, 255, 51)  # through, opaque, one fifth
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [255, 0, 0], [255, 204, 204]]
    assert images.read_image(tmp_path / "a.png", background=BLUE)[0].tolist() == [[0, 0, 255], [255, 0, 0], [51, 0, 204]]

    indexed = Image.new("P", (2, 1), 1)
    indexed.putpalette([*RED, *BLUE])
    indexed.putpixel((0, 0), 0)
    indexed.save(tmp_path / "p.png", transparency=0)
    assert images.read_image(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_sixteen_bits_are_divided_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0x1234, 0x80FF, 0xFFFF)))
    assert images.read_image(tmp_path / "a.png", channels=1).ravel().tolist() == [0x12, 0x80, 0xFF]


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 8), BLUE)
    picture.paste(RED, (0, 0, 8, 8))  # stored: red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise, red on top
    picture.save(tmp_path / "a.png", exif=exif)
    upright = images.read_image(tmp_path / "a.png")
    assert upright.shape == (16, 8, 3)
    assert (upright[:8] == RED).all()
    assert (upright[8:] == BLUE).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_size_scales_and_cuts_out_the_middle(tmp_path: Path, name: str) -> None:
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, :64], picture[:, 64:128], picture[:, 128:] = RED, (0, 255, 0), BLUE
    Image.fromarray(picture).save(tmp_path / name, quality=95)
    middle = images.read_image(tmp_path / name, size=16)
    assert middle.shape == (16, 16, 3)
    assert np.abs(middle[:, 2:14].astype(int) - (0, 255, 0)).max() < 40


def test_pictures_that_claim_too_much_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_bytes(40_000, 40_000, 8, 2, b"\0" * 1000))
    for read in (images.read_image, images.read_png_metadata):
        with pytest.raises(ValueError, match=r"bomb\.png"):
            read(tmp_path / "bomb.png")
    (tmp_path / "wide.png").write_bytes(png_bytes(2000, 1000, 8, 0, b"\0" * 1000))
    with pytest.raises(ValueError, match=r"2000 × 1000 pixels, more than 1000000"):
        images.read_image(tmp_path / "wide.png", max_pixels=10**6)
    with pytest.raises(ValueError, match=r"wide\.png"):  # the pixels are not there
        images.read_image(tmp_path / "wide.png")


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png") as caught:
        images.read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupt_pictures_are_read_or_refused_never_worse(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    path = tmp_path / "a.picture"
    Image.fromarray(noise(9, 9, 3)).save(path, kind)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, min(len(content) - 1, 120)), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        picture = images.read_image(path, max_pixels=10**6)
    except ValueError as error:
        assert "a.picture" in str(error)
        assert "\n" not in str(error)
    else:
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
