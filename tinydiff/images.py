"""Pictures: arrays to PNG and GIF and back, with their settings inside.

An image is a uint8 array (H, W), (H, W, 1) or (H, W, 3); a network sees float32 in [-1, 1], channels last.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from tinydiff.io import write_atomic

# Formats whose readers are safe on strangers' files (Pillow's EPS reader, for one, starts Ghostscript).
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
WHITE = (255, 255, 255)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 … 255, rounded; values outside are clipped. Raises ValueError for NaN."""
    if np.isnan(x).any():
        raise ValueError(f"{int(np.isnan(x).sum())} of {x.size} pixel values are NaN: the model or its input has diverged")
    return np.rint(np.clip(x / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def from_uint8(images: np.ndarray) -> np.ndarray:
    """0 … 255 to float32 in [-1, 1]: what `to_uint8` inverts exactly."""
    _check_uint8(images)
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel factor × factor times: (…, H, W, C) or (H, W)."""
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"pictures are enlarged by a whole number from 1 up, got {factor!r}")
    height_axis = image.ndim - 3 if image.ndim > 2 else 0
    return image.repeat(factor, axis=height_axis).repeat(factor, axis=height_axis + 1)


def scale(images: np.ndarray, size: int) -> np.ndarray:
    """Pictures (N, H, W, C) uint8 to (N, size, size, C), larger or smaller (Lanczos); of oblong ones the middle is cut out."""
    fitted = [ImageOps.fit(_to_pillow(image, 1), (size, size), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image).reshape(size, size, images.shape[3]) for image in fitted])


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1, enlarged: int = 1, background: int = 0) -> np.ndarray:
    """Lay pictures (N, H, W, C), uint8, out in rows: (rows · (H + gap) − gap, columns · (W + gap) − gap, C), times `enlarged`.

    `columns` is by default the one that makes the grid about as many pictures wide as high; empty cells hold `background`.
    """
    _check_uint8(images)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"a grid is made of at least one picture, as (N, H, W, C); got shape {images.shape}")
    n, height, width, channels = images.shape
    columns = columns if columns is not None else math.ceil(math.sqrt(n))
    if columns < 1 or gap < 0:
        raise ValueError(f"a grid needs columns >= 1 and gap >= 0, got columns={columns}, gap={gap}")
    rows = -(-n // columns)
    sheet = np.full((rows, height + gap, columns, width + gap, channels), background, np.uint8)
    for index, image in enumerate(images):
        sheet[index // columns, :height, index % columns, :width] = image
    sheet = sheet.reshape(rows * (height + gap), columns * (width + gap), channels)
    return enlarge(sheet[: rows * (height + gap) - gap, : columns * (width + gap) - gap], enlarged)


# ------------------------------------------------------------------------------------------------------------ PNG and GIF


def save_png(path: str | Path, image: np.ndarray, metadata: Mapping[str, Any] | None = None, enlarged: int = 1) -> None:
    """Write a picture as PNG, atomically, with `metadata` as `png_text` has it."""
    buffer = io.BytesIO()
    _to_pillow(image, enlarged).save(buffer, "PNG", pnginfo=png_text(metadata), optimize=True)
    write_atomic(path, buffer.getvalue())


def png_text(metadata: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    """Each entry as a text chunk (strings as they are, the rest as JSON), for Pillow to write. Raises ValueError for bad ones."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        if not (key.isascii() and key.isprintable() and key.strip() == key and 1 <= len(key) <= 79):
            raise ValueError(f"PNG metadata key {key!r} must be 1 to 79 printable ASCII characters without spaces at its ends")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if "\0" in text:
            raise ValueError(f"PNG metadata {key!r} holds a NUL character, which a PNG text can't")
        # Latin-1 text is what every PNG reader knows; the rest needs the newer, UTF-8 chunk.
        (info.add_text if text.isascii() else info.add_itxt)(key, text)
    return info


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file, by key. Raises FileNotFoundError or ValueError."""
    with _opened(path, ("PNG",)) as picture:
        picture.load()  # text may follow the pixels
        return {key: str(value) for key, value in getattr(picture, "text", {}).items()}


def save_gif(
    path: str | Path, frames: Sequence[np.ndarray] | np.ndarray, seconds_per_frame: float, hold: float = 0.0, enlarged: int = 1
) -> None:
    """Write pictures of one shape as an endless film, atomically; the last frame stays `hold` seconds longer.

    GIF counts hundredths of a second, and many viewers slow a frame of less than two down to ten.
    """
    if len(frames) == 0:
        raise ValueError("a film needs at least one frame, got none")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"the frames of a film have one shape, got {sorted({frame.shape for frame in frames})}")
    if not 0.02 <= seconds_per_frame <= 600 or not 0 <= hold <= 600:
        raise ValueError(f"a frame stays 0.02 to 600 seconds and hold is 0 to 600, got {seconds_per_frame} and {hold}")
    pictures = [_to_pillow(frame, enlarged) for frame in frames]
    durations = [round(seconds_per_frame * 100) * 10] * len(pictures)
    durations[-1] += round(hold * 100) * 10
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomic(path, buffer.getvalue())


def _to_pillow(image: np.ndarray, enlarged: int) -> Image.Image:
    _check_uint8(image)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"a picture has shape (H, W), (H, W, 1) or (H, W, 3) with no axis empty, got {image.shape}")
    return Image.fromarray(np.ascontiguousarray(enlarge(image, enlarged)))


def _check_uint8(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"a picture holds uint8, got {image.dtype}; `to_uint8` converts from [-1, 1]")


# ---------------------------------------------------------------------------------------------------------------- reading


def read_image(
    source: str | Path | bytes,
    size: int | None = None,
    channels: int = 3,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read any picture as uint8 (H, W, channels), upright as its EXIF says; the first frame of a film.

    Args:
        source: a file, or what is in one.
        size: scale the shorter side to `size` and cut the middle out of the longer: (size, size, channels).
        channels: 3 (RGB) or 1 (grey).
        background: what shows through transparent pixels.
        max_pixels: a picture that claims more is refused before its pixels are unpacked.

    Raises FileNotFoundError, or ValueError for a picture that is broken, too large, or of more than 16 bits.
    """
    if channels not in (1, 3):
        raise ValueError(f"a picture is read with 1 or 3 channels, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"a picture's size must be at least 1, got {size}")
    with _opened(source, FORMATS, max_pixels) as picture:
        if size is not None:  # lets JPEG's reader skip detail that would only be scaled away
            picture.draft(picture.mode, (2 * size, 2 * size))
        upright = _to_8_bits(ImageOps.exif_transpose(picture), background).convert("RGB" if channels == 3 else "L")
        if size is not None:
            upright = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        return np.array(upright).reshape(upright.height, upright.width, channels)


def _to_8_bits(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 where it should divide
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have more than 16 bits; convert it to 8 bits first")
    if picture.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", picture.size, (*background, 255)), picture.convert("RGBA"))
    return picture


@contextlib.contextmanager
def _opened(source: str | Path | bytes, formats: tuple[str, ...], max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    name = f"a file of {len(source):,} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"no such file: {source}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size (checked here, against our own limit) and of odd metadata
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise ValueError(f"it has {width} × {height} pixels, more than {max_pixels}; scale it down first")
                yield picture
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture ({', '.join(formats)})") from error
    except Exception as error:  # on a corrupt file Pillow's readers raise nearly anything, IndexError and SyntaxError too
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the picture {name}: {reason}") from error
