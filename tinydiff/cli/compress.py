"""`tinydiff compress` and `decompress`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from tinydiff.cli.options import as_json, check_out

File = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("picture", type=File)
@click.option("-o", "--out", type=File, required=True, help="File to write, .tdz.")
@click.option("--model", "run", required=True, help="Run folder of an autoencoder.")
@click.option("--step", type=float, default=0.25, show_default=True, help="How coarse, in deviations of the latents.")
@as_json
def compress(picture: Path, out: Path, run: str, step: float, as_json: bool) -> None:
    """Make a small file of PICTURE that a shared decoder opens, and say what JPEG and WebP make of as many bytes.

    What is transparent in PICTURE lies on white.
    """
    from tinydiff import compress as codec
    from tinydiff import images, io
    from tinydiff.models import AutoencoderKL
    from tinydiff.pipeline import load_model

    check_out(out, picture)
    if not 0 < step < math.inf:
        raise click.BadParameter(f"{step} is not above 0 and finite", param_hint="--step")
    model, card = load_model(run, "autoencoder")
    assert isinstance(model, AutoencoderKL)
    pixels = images.read_image(picture, channels=model.config["in_channels"])
    data = codec.compress(model, pixels, step, gaussian=card.get("kl", 0) > 0)
    psnr = codec.psnr(pixels, codec.decompress(model, data))
    io.write_atomic(out, data)
    rivals = {name: codec.rival(pixels, name, len(data)) for name in codec.RIVALS}
    result = {
        "file": str(out),
        "shape": list(pixels.shape),
        "bytes": len(data),
        "ratio": pixels.size / len(data),
        "bits_a_pixel": 8 * len(data) / (pixels.shape[0] * pixels.shape[1]),
        "step": step,
        "psnr": _finite(psnr),
        **{name: r and r._asdict() | {"psnr": _finite(r.psnr), "fits": r.bytes <= len(data)} for name, r in rivals.items()},
    }
    print(json.dumps(result) if as_json else "\n".join(_table(result, list(rivals))))


def _finite(psnr: float) -> float | None:
    """JSON has no infinity: None for equal pictures."""
    return psnr if math.isfinite(psnr) else None


def _table(result: dict[str, Any], rivals: list[str]) -> list[str]:
    """What `compress` prints."""

    def row(name: str, size: int, psnr: float | None, setting: str) -> str:
        return f"{name:6}{size:>12,} bytes  {'equal' if psnr is None else f'{psnr:.2f} dB':>9}  {setting}"

    height, width, channels = result["shape"]
    lines = [
        f"{result['file']}: {height} × {width} × {channels} pixels in {result['bytes']:,} bytes, 1 : {result['ratio']:.1f}, "
        f"{result['bits_a_pixel']:.3f} bits a pixel",
        row("tdz", result["bytes"], result["psnr"], f"step {result['step']:g}"),
    ]
    fitting = {"tdz": result["psnr"]}
    for name in rivals:
        if (found := result[name]) is None:
            lines.append(f"{name:6}can't hold this picture here")
            continue
        if found["fits"]:
            fitting[name] = found["psnr"]
        note = "" if found["fits"] else ", its smallest: it can't get as small"
        lines.append(row(name, found["bytes"], found["psnr"], f"quality {found['quality']}{note}"))
    best = max(fitting, key=lambda name: math.inf if fitting[name] is None else fitting[name])
    return [*lines, f"nearest to the original in at most {result['bytes']:,} bytes: {best}"]


@click.command()
@click.argument("file", type=File)
@click.option("-o", "--out", type=File, required=True, help="PNG to write.")
@click.option("--model", "run", required=True, help="Run folder of the autoencoder, or its decoder alone.")
def decompress(file: Path, out: Path, run: str) -> None:
    """Open a FILE of `tinydiff compress`. Of the model, the decoder's half of the weights is enough."""
    from tinydiff import compress as codec
    from tinydiff import images

    check_out(out, file)
    data = codec.read_file(file)
    model = codec.load_decoder(run)
    try:
        picture = codec.decompress(model, data)
    except ValueError as error:
        raise ValueError(f"cannot open {file}: {error}") from error
    images.save_png(out, picture)
    print(out)
