"""Pictures as small files that a shared decoder opens: an autoencoder's latents, quantised and entropy-coded.

Both sides have the autoencoder's weights; what travels is a whole number for each number of the latents. The reader needs the
decoder's half alone: a model folder (config.json, model.safetensors) whose weights may lack everything but `decoder.*` and
`post_quant_conv.*`, as `save_decoder` makes it. What a reader gets back is bit for bit the latents that were written; the pixels
are what its processor makes of them, so they may differ by float32's rounding from one machine to another.

The container, version 1, little-endian (C is the number of the latents' channels, P the payload's bytes):

    at          type     what
    0           4 bytes  magic: 89 54 44 5A, "\\x89TDZ"
    4           u8       version: 1
    5           u8       channels of the picture: 1 or 3
    6           u32 × 2  height and width of the picture
    14          u32 × 2  height and width of the latents
    22          u8       C
    23          6 bytes  hash of the decoder's weights: the twelve digits of `io.hash_weights`, in the published layout
    29          u32      P, a multiple of 4
    33          C times  f32: the step; i16, i16: the lowest and the highest number
    33 + 8C     P bytes  payload
    33 + 8C + P u32      CRC-32 (zlib's) of all before it

    A number n of channel c stands for n · step_c.

The payload is one range-coded stream of u32 words, from constriction's RangeEncoder: channel by channel, each row by row. A
channel whose lowest number is its highest takes no room. Nothing about probabilities is stored: each channel starts with a count
of 1 for every number from its lowest to its highest; a block of numbers is coded with the model Categorical(counts,
perfect=False), and then adds `WEIGHT` to the count of each. A block is as long as an eighth of the channel before it, and at
least `BLOCK` long. Counts are whole numbers, so both sides agree on any processor.
"""

from __future__ import annotations

import io as streams
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import constriction
import numpy as np
from PIL import Image

from tinydiff import io, metrics, tiling
from tinydiff.autograd import no_grad
from tinydiff.images import MAX_PIXELS, from_uint8, to_uint8
from tinydiff.models import AutoencoderKL
from tinydiff.models.autoencoder import DiagonalGaussian
from tinydiff.nn import no_init
from tinydiff.pipeline import check_card, model_folder
from tinydiff.tensor import as_tensor

MAGIC, VERSION = b"\x89TDZ", 1
HEAD, CHANNEL, CHECKSUM = struct.Struct("<4sBB4IB6sI"), struct.Struct("<fhh"), struct.Struct("<I")
MAX_BYTES = 1 << 28  # of a file
MAX_STEP = 1e6
BLOCK, WEIGHT = 8, 8
TILED_ABOVE = 512 * 512  # pixels: larger pictures go through the autoencoder in strips
STEP = 0.25
HALF = ("decoder.", "post_quant_conv.")  # the names of what a reader needs


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        shape: (H, W, C) of the picture; latents: (h, w, c) of its latents.
        decoder: hash of the decoder that opens the file.
        steps: (c,) float32. lowest, highest: (c,) int64, of the numbers in each channel.
    """

    shape: tuple[int, int, int]
    latents: tuple[int, int, int]
    decoder: str
    steps: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray


# -------------------------------------------------------------------------------------------------------------- the container


def pack(numbers: np.ndarray, steps: np.ndarray, shape: tuple[int, int, int], decoder: str) -> bytes:
    """The file that holds whole `numbers` (h, w, c), with the `steps` (c,) that they count, of a picture of `shape` (H, W, C).

    Raises ValueError for what the container can't hold.
    """
    lowest, highest = numbers.min((0, 1)), numbers.max((0, 1))
    if lowest.min() < -(2**15) or highest.max() >= 2**15:
        raise ValueError(f"the latents are up to {abs(numbers).max():.0f} steps, more than {2**15 - 1}; choose a larger step")
    header = Header(shape, numbers.shape, decoder, steps.astype(np.float32), lowest.astype(np.int64), highest.astype(np.int64))
    _check(header, MAX_PIXELS)
    payload = _encode(header, numbers.astype(np.int64))
    height, width, channels = numbers.shape
    head = HEAD.pack(
        MAGIC, VERSION, shape[2], *shape[:2], height, width, channels, bytes.fromhex(decoder), len(payload)
    )  # fmt: skip
    table = b"".join(CHANNEL.pack(*row) for row in zip(header.steps, header.lowest, header.highest))
    body = head + table + payload
    return body + CHECKSUM.pack(zlib.crc32(body))


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Header, bytes]:
    """The header and the payload of a whole file that is what it says; allocates nothing. Raises ValueError for any other."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise ValueError(f"it is not a .tdz file: it begins with {data[:4]!r}, not {MAGIC!r}")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise ValueError(f"it has version {data[len(MAGIC)]} of the format, and this program reads {VERSION}; update it")
    if len(data) < HEAD.size:
        raise ValueError(f"it is cut off: {len(data)} bytes, and the header alone has {HEAD.size}; copy it again")
    _, _, channels, *sizes, depth, digest, length = HEAD.unpack_from(data)
    start = HEAD.size + depth * CHANNEL.size
    whole = start + length + CHECKSUM.size
    if len(data) != whole:
        raise ValueError(f"it has {len(data)} bytes and should have {whole}: cut off, or something added; copy it again")
    if CHECKSUM.unpack_from(data, start + length)[0] != zlib.crc32(memoryview(data)[: start + length]):
        raise ValueError("its checksum doesn't fit: it was damaged on the way; copy it again")
    rows = np.array(list(CHANNEL.iter_unpack(data[HEAD.size : start])), np.float64).reshape(depth, 3)
    steps, (lowest, highest) = rows[:, 0].astype(np.float32), rows[:, 1:].astype(np.int64).T
    header = Header((*sizes[:2], channels), (*sizes[2:], depth), digest.hex(), steps, lowest, highest)
    _check(header, max_pixels)
    if length % 4:
        raise ValueError(f"its payload has {length} bytes, which are no whole words of 4")
    return header, data[start : start + length]


def _check(header: Header, max_pixels: int) -> None:
    (height, width, channels), (*latents, depth) = header.shape, header.latents
    if channels not in (1, 3):
        raise ValueError(f"its picture has {channels} channels; 1 (grey) and 3 (RGB) are possible")
    if not 1 <= height * width <= max_pixels:
        raise ValueError(f"its picture has {height} × {width} pixels; 1 to {max_pixels} are possible")
    if not (1 <= latents[0] <= height and 1 <= latents[1] <= width and 1 <= depth <= 255):
        raise ValueError(f"latents of {latents[0]}×{latents[1]}×{depth} fit no picture of {height} × {width} pixels")
    if math.prod(header.latents) > 4 * max_pixels:
        raise ValueError(f"it has {math.prod(header.latents)} latents; at most {4 * max_pixels} are possible")
    if not np.all((header.steps > 0) & (header.steps <= MAX_STEP)):  # NaN is neither
        raise ValueError(f"its steps are {header.steps.tolist()}; they must be above 0 and at most {MAX_STEP:g}")
    if np.any(header.lowest > header.highest):
        raise ValueError(f"its lowest numbers, {header.lowest.tolist()}, are above its highest, {header.highest.tolist()}")


def unpack(header: Header, payload: bytes) -> np.ndarray:
    """The numbers (h, w, c), int16, of a file that `read_header` took apart. Raises ValueError for a payload that is none."""
    height, width, depth = header.latents
    numbers = np.empty((depth, height * width), np.int16)
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))

    def read(model: Any, channel: int, part: slice) -> np.ndarray:
        found = decoder.decode(model, part.stop - part.start)
        numbers[channel, part] = found + header.lowest[channel]
        return found

    try:
        _walk(header, read)
    except AssertionError as error:  # what constriction raises for words that no encoder writes
        raise ValueError("its payload is no entropy-coded data") from error
    if not decoder.maybe_exhausted():
        raise ValueError("its payload goes on after the last number")
    for channel in np.flatnonzero(header.lowest == header.highest):
        numbers[channel] = header.lowest[channel]
    return numbers.reshape(depth, height, width).transpose(1, 2, 0)


def _encode(header: Header, numbers: np.ndarray) -> bytes:
    encoder = constriction.stream.queue.RangeEncoder()
    symbols = (numbers - header.lowest).transpose(2, 0, 1).reshape(numbers.shape[2], -1).astype(np.int32)

    def write(model: Any, channel: int, part: slice) -> np.ndarray:
        encoder.encode(symbols[channel, part], model)
        return symbols[channel, part]

    _walk(header, write)
    return encoder.get_compressed().astype("<u4").tobytes()


def _walk(header: Header, code: Callable[[Any, int, slice], np.ndarray]) -> None:
    """Call `code(model, channel, part)` for each block in turn; it answers the block's numbers, counted from the lowest."""
    length = header.latents[0] * header.latents[1]
    for channel, span in enumerate(header.highest - header.lowest + 1):
        if span == 1:
            continue
        counts, start = np.ones(span), 0  # whole numbers, exact up to 2⁵³
        while start < length:
            part = slice(start, min(length, start + max(BLOCK, start // 8)))
            model = constriction.stream.model.Categorical(counts, perfect=False)
            counts += WEIGHT * np.bincount(code(model, channel, part), minlength=span)
            start = part.stop


# --------------------------------------------------------------------------------------------------------------- the decoder


def load_decoder(run: str | Path) -> AutoencoderKL:
    """An autoencoder without its encoder, from a run or from a folder of `save_decoder`; of other weights nothing is used.

    Raises ValueError when there is none.
    """
    folder = model_folder(run)
    card = io.read_json(folder / "config.json")
    try:
        check_card(card)
        if card["task"] != "autoencoder":
            raise ValueError(f"it is a {card['task']}, and an autoencoder is needed here")
        with no_init():
            model = AutoencoderKL.from_config(card["model"])
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no autoencoder: {error}") from error
    del model.encoder, model.quant_conv
    layouts = {name: parameter.layout for name, parameter in model.named_parameters()}
    weights = io.load_weights(folder / "model.safetensors")
    half = {name: array.astype(np.float32, copy=False) for name, array in weights.items() if name.startswith(HALF)}
    model.load_state_dict({name: io.from_disk(name, array, layouts.get(name, "other")) for name, array in half.items()})
    model.requires_grad_(False).eval()
    return model


def save_decoder(run: str | Path, folder: str | Path) -> None:
    """Write what a reader of files needs of `run`: its config.json, and model.safetensors with the decoder's half alone."""
    card, weights = io.read_json(model_folder(run) / "config.json"), decoder_weights(load_decoder(run))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    io.write_json(folder / "config.json", card)
    io.save_weights(folder / "model.safetensors", weights, {"hash": io.hash_weights(weights)})


def decoder_weights(model: AutoencoderKL) -> io.Weights:
    """The decoder's half of the weights in the published layout, by name."""
    return {name: io.to_disk(name, p.data, p.layout) for name, p in model.named_parameters() if name.startswith(HALF)}


# ------------------------------------------------------------------------------------------------------------------- pictures


def compress(model: AutoencoderKL, picture: np.ndarray, step: float = STEP, gaussian: bool = True) -> bytes:
    """The file of a picture, uint8 (H, W, C).

    Args:
        step: how coarse: the finest channel's step, in deviations of the latents (1/scaling_factor).
        gaussian: whether the model was trained with a KL divergence (`kl` in its card). Then a channel's step grows with the
            noise that the encoder claims for it, for that is what the decoder learned to bear (a channel that carries nothing
            takes no room); else all channels have one step.

    Raises ValueError for a picture that the model doesn't take, and for a step too small or not positive.
    """
    if not 0 < step < math.inf:
        raise ValueError(f"step = {step}: it must be above 0 and finite")
    channels = (model.config["in_channels"], model.config["out_channels"])
    if picture.ndim != 3 or channels != (picture.shape[-1],) * 2:
        raise ValueError(f"the model turns pictures of {channels[0]} channels into {channels[1]}; got shape {picture.shape}")
    x = from_uint8(picture[None])
    with no_grad():
        found = tiling.encode(model, x) if _large(picture.shape) else model.encode(as_tensor(x))
    z = found.mode().numpy()[0]
    if not np.isfinite(z).all():
        raise ValueError("the encoder's latents are not finite: the model has diverged")
    steps = (step / model.config["scaling_factor"]) * (_tolerance(found) if gaussian else np.ones(z.shape[-1]))
    steps = steps.astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        numbers = np.rint(z.astype(np.float64) / steps)
    return pack(numbers, steps, picture.shape, io.hash_weights(decoder_weights(model)))


def _tolerance(found: DiagonalGaussian) -> np.ndarray:
    """By channel the deviation of the encoder's noise, relative to the least: 1 to 1,000."""
    noise = found.logvar.numpy().mean((0, 1, 2), dtype=np.float64) / 2
    return np.exp(np.minimum(noise - noise.min(), math.log(1000)))


def _large(shape: tuple[int, ...]) -> bool:
    return shape[0] * shape[1] > TILED_ABOVE


def decompress(model: AutoencoderKL, data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture of a file, uint8 (H, W, C), from the model that made it or from its decoder (`load_decoder`).

    Raises ValueError for a file that is damaged, larger than `max_pixels`, or another decoder's; nothing is allocated before.
    """
    header, payload = read_header(data, max_pixels)
    own = io.hash_weights(decoder_weights(model))
    if header.decoder != own:
        raise ValueError(f"the decoder {header.decoder} opens it, and this one is {own}; give the run that it was made with")
    height, width, channels = header.shape
    fitting = (-(-height // model.factor), -(-width // model.factor), model.config["latent_channels"])
    if header.latents != fitting or channels != model.config["out_channels"]:
        raise ValueError(f"it has latents {header.latents} of a picture {header.shape}; its decoder needs {fitting} for one")
    z = unpack(header, payload).astype(np.float32)[None] * header.steps
    if _large(header.shape):
        x = tiling.decode(model, z, (height, width))
    else:
        with no_grad():
            x = model.decode(as_tensor(z), (height, width)).numpy()
    return to_uint8(x[0])


def read_file(path: str | Path) -> bytes:
    """The bytes of a file of at most `MAX_BYTES`. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, and a .tdz file at most {MAX_BYTES}: is it the file meant?")
    return path.read_bytes()


# ----------------------------------------------------------------------------------------------------------------- the others


class Rival(NamedTuple):
    """What another format makes of a picture: its quality setting, the file's bytes, and PSNR in dB."""

    quality: int
    bytes: int
    psnr: float


RIVALS: Mapping[str, Mapping[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}


def rival(picture: np.ndarray, name: str, most: int) -> Rival | None:
    """The best of a format in at most `most` bytes; if it can't get that small, its smallest. None if it can't hold the picture.

    picture is uint8 (H, W, C); qualities are 1 to 100, at Pillow's defaults but for what `RIVALS` adds.
    """
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)

    def written(quality: int) -> bytes:
        buffer = streams.BytesIO()
        image.save(buffer, name, quality=quality, **RIVALS[name])
        return buffer.getvalue()

    try:
        low, high = 1, 100
        best = written(low)
        while low < high:
            middle = (low + high + 1) // 2
            tried = written(middle)
            if len(tried) <= most:
                low, best = middle, tried
            else:
                high = middle - 1
    except (OSError, ValueError, KeyError):  # sides above the format's limit; a Pillow built without the format
        return None
    with Image.open(streams.BytesIO(best)) as opened:
        back = np.asarray(opened.convert(image.mode)).reshape(picture.shape)
    return Rival(low, len(best), psnr(picture, back))


def psnr(picture: np.ndarray, back: np.ndarray) -> float:
    """PSNR in dB of one uint8 picture (H, W, C) against another."""
    return float(metrics.psnr(picture[None], back[None])[0])
