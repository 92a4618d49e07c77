"""Compressed files: the same numbers back bit by bit, and one clear error for anything that is no whole file of ours."""

from __future__ import annotations

import json
import math
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tinydiff import compress as codec
from tinydiff import images, io
from tinydiff.cli import main
from tinydiff.models import AutoencoderKL
from tinydiff.pipeline import load_model
from tinydiff.random import manual_seed
from tinydiff.tensor import as_tensor

HASH = "0123456789ab"


def make_run(folder: Path, channels: int = 3, kl: float = 1e-4, **settings: object) -> Path:
    """A model folder with random weights: pictures of 1/4 of the size, 3 channels."""
    manual_seed(channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": [4, 4, 8], "norm_num_groups": 2, "latent_channels": 3, "scaling_factor": 0.5}
    model = AutoencoderKL(channels, channels, **blocks, **(sizes | settings))  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    card = {"task": "autoencoder", "shape": [8, 8, channels], "class_names": [], "kl": kl, "model": model.config}
    io.write_json(folder / "config.json", card)
    weights = {name: io.to_disk(name, p.data, p.layout) for name, p in model.named_parameters()}
    io.save_weights(folder / "model.safetensors", weights)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "rgb")


@pytest.fixture(scope="module")
def model(run: Path) -> AutoencoderKL:
    loaded = load_model(run)[0]
    assert isinstance(loaded, AutoencoderKL)
    return loaded


def picture(height: int = 13, width: int = 18, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def file(model: AutoencoderKL) -> bytes:
    return codec.compress(model, picture())


def sealed(body: bytes) -> bytes:
    """`body` with the checksum that fits."""
    return body + struct.pack("<I", zlib.crc32(body))


def opened(data: bytes) -> np.ndarray:
    return codec.unpack(*codec.read_header(data))


# ------------------------------------------------------------------------------------------------------------ the container


@st.composite
def latents(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (h, w, c), of wide and narrow channels, and steps (c,)."""
    shape = draw(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5)))
    bound = draw(st.sampled_from([0, 1, 5, 300, 2**15 - 1]))
    numbers = draw(hnp.arrays(np.int64, shape, elements=st.integers(-bound - (bound == 2**15 - 1), bound)))
    if draw(st.booleans()):
        numbers[..., 0] = draw(st.integers(-(2**15), 2**15 - 1))  # a channel without news
    steps = draw(hnp.arrays(np.float32, shape[2], elements=st.floats(2.0**-100, 1e6, width=32)))
    return numbers, steps


@given(latents(), st.sampled_from([1, 3]))
@settings(max_examples=150)
def test_numbers_come_back_bit_by_bit(given: tuple[np.ndarray, np.ndarray], channels: int) -> None:
    numbers, steps = given
    shape = (4 * numbers.shape[0] - 1, 4 * numbers.shape[1] - 3, channels)
    data = codec.pack(numbers, steps, shape, HASH)
    header, payload = codec.read_header(data)
    assert (header.shape, header.latents, header.decoder) == (shape, numbers.shape, HASH)
    assert header.steps.tobytes() == steps.tobytes()
    np.testing.assert_array_equal(codec.unpack(header, payload), numbers)


def test_many_numbers_come_back() -> None:
    numbers = np.random.default_rng(0).geometric(0.2, (150, 130, 2)) - 5  # enough for blocks of every length
    np.testing.assert_array_equal(opened(codec.pack(numbers, np.ones(2), (150, 130, 1), HASH)), numbers)


def test_the_bytes_are_where_the_table_says() -> None:
    numbers = np.array([[[3, -7], [3, 9]]])
    data = codec.pack(numbers, np.array([0.5, 2.0]), (3, 8, 1), HASH)
    assert data[:6] == b"\x89TDZ\x01\x01"
    assert struct.unpack("<IIII", data[6:22]) == (3, 8, 1, 2)
    assert data[22] == 2
    assert data[23:29].hex() == HASH
    length = int.from_bytes(data[29:33], "little")
    assert struct.unpack("<fhhfhh", data[33:49]) == (0.5, 3, 3, 2.0, -7, 9)
    assert length % 4 == 0 and len(data) == 49 + length + 4
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4])


# A file as version 1 has it, of numbers known by a rule: another version of the library or of this module must read it.
OLD = bytes.fromhex(
    "8954445a010318000000230000000600000009000000030123456789ab340000000000803efdff03000000003f00000d0000"
    "00803f05000500430200001cc4fbf36abd35a59722141fb38a2a28d7823e3500bb052ab0bd8a8e4648c953e298a5cbfefd7d"
    "dac23df398c960c025c180d896"
)
OLD_NUMBERS = np.array([[[(i * j) % 7 - 3, i + j, 5] for j in range(9)] for i in range(6)])


def test_an_old_file_is_read_and_written_the_same() -> None:
    np.testing.assert_array_equal(opened(OLD), OLD_NUMBERS)
    assert codec.pack(OLD_NUMBERS, np.array([0.25, 0.5, 1.0]), (24, 35, 3), HASH) == OLD


def test_the_file_is_about_as_small_as_the_entropy() -> None:
    rng = np.random.default_rng(0)
    numbers = np.stack([rng.integers(-1, 1, (120, 120)), np.rint(rng.normal(40, 3, (120, 120)))], -1)
    bits = 120 * 120 * (1 + math.log2(3 * math.sqrt(2 * math.pi * math.e)))  # a coin, and a Gaussian in steps of 1
    data = codec.pack(numbers, np.ones(2), (120, 120, 1), HASH)
    assert bits / 8 < len(data) < 1.02 * bits / 8 + 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"numbers": np.full((1, 1, 1), 2.0**15)}, "up to 32768 steps, more than 32767; choose a larger step"),
        ({"numbers": np.full((1, 1, 1), -np.inf)}, "up to inf steps"),
        ({"shape": (4, 4, 4)}, "4 channels; 1 .grey. and 3 .RGB. are possible"),
        ({"steps": np.zeros(1)}, "steps are .0.0.; they must be above 0"),
        ({"steps": np.full(1, np.nan)}, "steps are .nan."),
        ({"shape": (1 << 20, 1 << 20, 1)}, "1048576 × 1048576 pixels"),
        ({"numbers": np.zeros((9, 9, 1))}, "latents of 9×9×1 fit no picture of 4 × 4"),
        ({"numbers": np.zeros((1, 1, 256)), "steps": np.ones(256)}, "latents of 1×1×256"),
    ],
)
def test_what_the_container_cannot_hold(change: dict[str, object], words: str) -> None:
    whole = {"numbers": np.zeros((1, 1, 1)), "steps": np.ones(1), "shape": (4, 4, 1), "decoder": HASH}
    codec.pack(**whole)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        codec.pack(**(whole | change))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ strangers' files


def test_every_truncation_and_every_flipped_bit_is_told(model: AutoencoderKL, file: bytes) -> None:
    codec.decompress(model, file)
    for length in range(len(file)):
        with pytest.raises(ValueError, match=r"not a \.tdz file|cut off"):
            codec.decompress(model, file[:length])
    for bit in range(8 * len(file)):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            codec.decompress(model, bytes(damaged))
    with pytest.raises(ValueError, match="something added"):
        codec.decompress(model, file + b"\0")


@given(st.binary(max_size=200), st.booleans())
def test_noise_is_no_file(noise: bytes, headed: bool) -> None:
    with pytest.raises(ValueError):
        codec.read_header(codec.MAGIC + b"\x01" + noise if headed else noise)


@given(data=st.data())
@settings(max_examples=300)
def test_lies_under_a_fitting_checksum(data: st.DataObject, model: AutoencoderKL, file: bytes) -> None:
    """Either one ValueError, or a picture of the size that the header gives: nothing else, and nothing large."""
    body = bytearray(file[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    lie = sealed(bytes(body))
    try:
        back = codec.decompress(model, lie)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert back.shape == (*struct.unpack("<II", lie[6:14]), lie[5]) and back.size < 1000


@pytest.mark.parametrize(
    ("at", "layout", "value", "words"),
    [
        (4, "<B", 2, "version 2 of the format, and this program reads 1; update it"),
        (5, "<B", 2, "2 channels"),
        (5, "<B", 1, "its decoder needs"),
        (6, "<II", (2**32 - 1, 2**32 - 1), "4294967295 × 4294967295 pixels"),
        (6, "<II", (0, 5), "0 × 5 pixels"),
        (6, "<IIII", (10_000, 10_000, 10_000, 10_000), "its decoder needs"),
        (14, "<II", (2**32 - 1, 2**32 - 1), "fit no picture"),
        (14, "<II", (4, 4), "its decoder needs"),
        (23, "6s", b"\0" * 6, "the decoder 000000000000 opens it, and this one is"),
        (29, "<I", 2**32 - 4, "should have 429"),
        (33, "<f", math.nan, "steps are .nan"),
        (33, "<f", 0.0, "above 0"),
        (33, "<f", -1.0, "above 0"),
        (33, "<f", math.inf, "at most 1e.06"),
        (37, "<hh", (5, 4), "lowest numbers, .5"),
    ],
)
def test_each_lie_in_the_header_is_named_and_costs_no_memory(
    at: int, layout: str, value: object, words: str, model: AutoencoderKL, file: bytes
) -> None:
    body = bytearray(file[:-4])
    struct.pack_into(layout, body, at, *(value if isinstance(value, tuple) else (value,)))
    lie = sealed(bytes(body))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words):
            codec.decompress(model, lie)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_picture_above_the_limit_is_refused(model: AutoencoderKL, file: bytes) -> None:
    assert codec.decompress(model, file, max_pixels=13 * 18).shape == (13, 18, 3)
    with pytest.raises(ValueError, match="13 × 18 pixels; 1 to 233 are possible"):
        codec.decompress(model, file, max_pixels=13 * 18 - 1)


def test_more_latents_than_any_picture_needs() -> None:
    data = codec.pack(np.zeros((4, 4, 65)), np.ones(65), (4, 4, 1), HASH)
    codec.read_header(data)
    with pytest.raises(ValueError, match="1040 latents; at most 64 are possible"):
        codec.read_header(data, max_pixels=16)


@pytest.mark.parametrize("payload", [b"", b"\xff" * 40, b"\0" * 40, b"\x5a" * 4])
def test_a_payload_that_no_encoder_wrote(payload: bytes, file: bytes) -> None:
    start = 33 + 8 * 3
    lie = sealed(file[:29] + struct.pack("<I", len(payload)) + file[33:start] + payload)
    header, found = codec.read_header(lie)
    try:
        assert codec.unpack(header, found).shape == header.latents
    except ValueError as error:
        assert "its payload" in str(error)
    longer = sealed(file[:29] + struct.pack("<I", len(file) - start - 4 + 40) + file[33:-4] + b"\x5a" * 40)
    with pytest.raises(ValueError, match="goes on after the last number"):
        opened(longer)
    with pytest.raises(ValueError, match="no whole words"):
        codec.read_header(sealed(file[:29] + struct.pack("<I", 3) + file[33:start] + b"abc"))


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.tdz", "wb") as huge:
        huge.truncate(codec.MAX_BYTES + 1)  # takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"huge.tdz has 268435457 bytes, and a .tdz file at most 268435456"):
            codec.read_file(tmp_path / "huge.tdz")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(FileNotFoundError, match="no such file"):
        codec.read_file(tmp_path / "none.tdz")


# ------------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (5, 7), (1, 30), (23, 3)])
def test_a_picture_of_any_size(size: tuple[int, int], model: AutoencoderKL) -> None:
    """Each latent is kept to half a step, and the decoder's picture of them is what comes back."""
    pixels = picture(*size)
    data = codec.compress(model, pixels, 0.3)
    header, payload = codec.read_header(data)
    assert header.latents == (-(-size[0] // 4), -(-size[1] // 4), 3)
    kept = codec.unpack(header, payload) * header.steps.astype(np.float64)
    found = model.encode(as_tensor(images.from_uint8(pixels[None])))
    assert np.all(abs(kept - found.mean.numpy()[0]) <= header.steps * 0.500001)
    noise = [math.exp(float(np.mean(found.logvar.numpy()[..., channel], dtype=np.float64)) / 2) for channel in range(3)]
    np.testing.assert_allclose(header.steps, [0.3 / 0.5 * n / min(noise) for n in noise], rtol=1e-5)
    expected = model.decode(as_tensor(kept[None].astype(np.float32))).numpy()[0, : size[0], : size[1]]
    back = codec.decompress(model, data)
    assert back.dtype == np.uint8 and back.shape == pixels.shape
    np.testing.assert_array_equal(back, images.to_uint8(expected))


def test_a_plain_bottleneck_has_one_step_for_all(model: AutoencoderKL) -> None:
    header, _ = codec.read_header(codec.compress(model, picture(), 0.3, gaussian=False))
    np.testing.assert_allclose(header.steps, 0.6)


def test_larger_steps_make_smaller_files(model: AutoencoderKL) -> None:
    sizes = [len(codec.compress(model, picture(80, 80), step)) for step in (0.02, 0.1, 0.5, 1e5)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sizes[-1] == 33 + 3 * 8 + 4  # all numbers are 0


def test_large_pictures_go_in_strips(model: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(70, 45)
    whole = codec.compress(model, pixels)
    back = codec.decompress(model, whole)
    monkeypatch.setattr(codec, "TILED_ABOVE", 70 * 45 - 1)
    strips = {"encode": 0, "decode": 0}
    for name in strips:
        real = getattr(codec.tiling, name)

        def counted(*args: object, name: str = name, real: object = real) -> object:
            strips[name] += 1
            return real(*args)  # type: ignore[operator]

        monkeypatch.setattr(codec.tiling, name, counted)
    differences = opened(codec.compress(model, pixels)).astype(int) - opened(whole)
    assert (differences != 0).mean() < 0.01 and abs(differences).max() <= 1  # where rounding is a toss
    assert abs(codec.decompress(model, whole).astype(int) - back).max() <= 1
    assert strips == {"encode": 1, "decode": 1}


def test_pictures_and_steps_that_the_model_does_not_take(model: AutoencoderKL) -> None:
    for step in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be above 0 and finite"):
            codec.compress(model, picture(), step)
    with pytest.raises(ValueError, match="choose a larger step"):
        codec.compress(model, picture(), 1e-9)
    with pytest.raises(ValueError, match=r"3 channels into 3; got shape \(13, 18, 1\)"):
        codec.compress(model, picture(channels=1))
    with pytest.raises(TypeError, match="uint8"):
        codec.compress(model, picture() / 255)


# --------------------------------------------------------------------------------------------------------------- the decoder


def altered(run: Path, folder: Path, change: object) -> Path:
    """A copy of the run with other weights: `change(name, array)` answers an array, or None to leave it out."""
    shutil.copytree(run, folder)
    weights = {name: change(name, array) for name, array in io.load_weights(run / "model.safetensors").items()}  # type: ignore[operator]
    io.save_weights(folder / "model.safetensors", {name: array for name, array in weights.items() if array is not None})
    return folder


def is_encoder(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv."))


def test_the_decoder_is_enough(run: Path, model: AutoencoderKL, file: bytes, tmp_path: Path) -> None:
    expected = codec.decompress(model, file)
    absent = altered(run, tmp_path / "absent", lambda name, array: None if is_encoder(name) else array)
    garbage = altered(run, tmp_path / "garbage", lambda name, array: np.full(3, np.nan) if is_encoder(name) else array)
    codec.save_decoder(run, tmp_path / "saved")
    names = set(io.load_weights(tmp_path / "saved" / "model.safetensors"))
    assert names == set(io.load_weights(absent / "model.safetensors"))
    assert names and len(names) < len(io.load_weights(run / "model.safetensors"))
    for folder in (run, absent, garbage, tmp_path / "saved"):
        np.testing.assert_array_equal(codec.decompress(codec.load_decoder(folder), file), expected)


def test_another_decoder_is_refused(run: Path, file: bytes, tmp_path: Path) -> None:
    name = "decoder.conv_out.bias"
    other = altered(run, tmp_path / "other", lambda n, array: np.nextafter(array, np.float32(9)) if n == name else array)
    with pytest.raises(ValueError, match=f"the decoder {file[23:29].hex()} opens it, and this one is [0-9a-f]+; give the run"):
        codec.decompress(codec.load_decoder(other), file)
    lacking = altered(run, tmp_path / "lacking", lambda n, array: None if n == name else array)
    with pytest.raises(ValueError, match=f"missing: {name}"):
        codec.load_decoder(lacking)
    with pytest.raises(ValueError, match="it is a classifier, and an autoencoder is needed"):
        codec.load_decoder("classifier")
    with pytest.raises(ValueError, match="no such run folder"):
        codec.load_decoder(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("name", ["JPEG", "WebP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_rivals_get_the_best_quality_that_fits(name: str, channels: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 40 * 56 * channels).reshape(40, 56, channels)
    pixels = np.clip(ramp + 20 * np.random.default_rng(0).standard_normal(ramp.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    sizes = {}
    for quality in range(1, 101):
        image.save(tmp_path / str(quality), name, quality=quality, **codec.RIVALS[name])
        sizes[quality] = (tmp_path / str(quality)).stat().st_size
    most = (sizes[1] + sizes[100]) // 2
    best = codec.rival(pixels, name, most)
    assert best is not None
    assert sizes[best.quality] == best.bytes <= most < sizes[best.quality + 1]
    back = np.asarray(Image.open(tmp_path / str(best.quality)).convert(image.mode)).reshape(pixels.shape) / 255.0
    assert best.psnr == pytest.approx(-10 * math.log10(np.mean((back - pixels / 255.0) ** 2)))
    least = codec.rival(pixels, name, 10)
    assert least is not None and (least.quality, least.bytes) == (1, sizes[1])


def test_a_picture_too_wide_for_a_rival() -> None:
    assert codec.rival(np.zeros((1, 16384, 1), np.uint8), "WebP", 100) is None
    assert codec.rival(np.zeros((1, 16384, 1), np.uint8), "JPEG", 10**6) is not None


# ----------------------------------------------------------------------------------------------------------- the command line


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a command that must fail with this code; returns its one line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and printed.err.startswith("tinydiff: error: ")
    return printed.err


def test_there_and_back(run: Path, model: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = picture(30, 41)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    out = tmp_path / "photo.tdz"
    shown = command(capsys, "compress", tmp_path / "photo.png", "-o", out, "--model", run, "--step", "0.5")
    size = out.stat().st_size
    assert out.read_bytes() == codec.compress(model, pixels, 0.5)
    assert f"30 × 41 × 3 pixels in {size:,} bytes, 1 : {30 * 41 * 3 / size:.1f}" in shown
    # Random pixels need far more in JPEG and WebP than a hundred numbers of latents.
    assert shown.count("its smallest: it can't get as small") == 2 and f"at most {size:,} bytes: tdz" in shown

    codec.save_decoder(run, tmp_path / "decoder")
    command(capsys, "decompress", out, "-o", tmp_path / "back.png", "--model", tmp_path / "decoder")
    back = images.read_image(tmp_path / "back.png")
    np.testing.assert_array_equal(back, codec.decompress(model, out.read_bytes()))

    found = json.loads(command(capsys, "compress", tmp_path / "photo.png", "-o", out, "--model", run, "--step", "0.5", "--json"))
    assert (found["bytes"], found["shape"], found["JPEG"]["fits"]) == (size, [30, 41, 3], False)
    assert found["psnr"] == pytest.approx(-10 * math.log10(np.mean((back / 255.0 - pixels / 255.0) ** 2)))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["back.png", "decoder", "photo.png", "photo.tdz"]  # nothing temporary


def test_it_says_where_the_others_win(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey all over: an untrained network misses it, and the others need hardly a byte."""
    Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "grey.png")
    shown = command(capsys, "compress", tmp_path / "grey.png", "-o", tmp_path / "a.tdz", "--model", run, "--step", "0.01")
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "quality" in lines["WebP"] and "can't" not in lines["WebP"]
    assert lines["nearest"].endswith(("bytes: WebP", "bytes: JPEG"))


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_lies_on_white(channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", channels)
    clear = np.zeros((9, 10, 4), np.uint8)
    clear[:, 5:] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    command(capsys, "compress", tmp_path / "clear.png", "-o", tmp_path / "a.tdz", "--model", run)
    composed = np.full((9, 10, 3), 255, np.uint8)
    composed[:, 5:] = (255, 0, 0)
    flat = composed if channels == 3 else np.asarray(Image.fromarray(composed).convert("L"))[..., None]
    loaded = load_model(run)[0]
    assert isinstance(loaded, AutoencoderKL)
    assert (tmp_path / "a.tdz").read_bytes() == codec.compress(loaded, flat)
    command(capsys, "decompress", tmp_path / "a.tdz", "-o", tmp_path / "b.png", "--model", run)
    with Image.open(tmp_path / "b.png") as back:
        assert (back.size, back.mode) == ((10, 9), "L" if channels == 1 else "RGB")


def test_bad_files_leave_nothing_behind(run: Path, file: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, out = tmp_path / "bad.tdz", tmp_path / "back.png"
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    foreign = (tmp_path / "photo.png").read_bytes()
    for data, words in (
        (b"", "not a .tdz file"),
        (foreign, "not a .tdz file"),
        (file[:40], "cut off"),
        (file[:50] + b"!" + file[51:], "checksum"),
        (file[:4] + b"\x09" + file[5:], "version 9"),
    ):
        bad.write_bytes(data)
        message = fails(capsys, 1, "decompress", bad, "-o", out, "--model", run)
        assert words in message and str(bad) in message
    assert not out.exists()
    other = make_run(tmp_path / "other", latent_channels=2)
    bad.write_bytes(file)
    assert "give the run that it was made with" in fails(capsys, 1, "decompress", bad, "-o", out, "--model", other)
    assert "no such file" in fails(capsys, 1, "decompress", tmp_path / "none", "-o", out, "--model", run)
    assert "no such run folder" in fails(capsys, 1, "decompress", bad, "-o", out, "--model", tmp_path / "none")
    assert "there is no folder" in fails(capsys, 2, "decompress", bad, "-o", tmp_path / "no" / "a.png", "--model", run)
    assert "is what is read" in fails(capsys, 2, "decompress", bad, "-o", bad, "--model", run)
    assert bad.read_bytes() == file and not out.exists()

    photo, new = tmp_path / "photo.png", tmp_path / "new.tdz"
    assert "is not a picture" in fails(capsys, 1, "compress", bad, "-o", new, "--model", run)
    assert "--step" in fails(capsys, 2, "compress", photo, "-o", new, "--model", run, "--step", "nan")
    assert "larger step" in fails(capsys, 1, "compress", photo, "-o", new, "--model", run, "--step", "1e-9")
    assert "is what is read" in fails(capsys, 2, "compress", photo, "-o", photo, "--model", run)
    assert "an autoencoder is needed" in fails(capsys, 1, "compress", photo, "-o", new, "--model", "classifier")
    assert photo.read_bytes() == foreign
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tdz", "other", "photo.png"]
