"""`tinydiff sample`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

from tinydiff.cli.options import MOST, Numbers, as_json, check_device, check_out, device, progress
from tinydiff.diffusion import SAMPLERS

File = click.Path(dir_okay=False, path_type=Path)
STOCHASTIC = ("ddpm", "euler_ancestral")  # they draw noise on the way


@click.command()
@click.argument("run")
@click.option("--class", "classes", type=Numbers(["all"]), help="Which: 3, or 0,1,4, or 0-4, or all.  [default: all]")
@click.option("--prompt", "prompts", multiple=True, help="What to draw, in words; may be given several times.")
@click.option("--negative", help="What not to draw, in words.")
@click.option("--n", type=click.IntRange(1, MOST), help="How many in total.  [default: 8 a class or prompt, or as many as seeds]")
@click.option("--seeds", type=Numbers(), help="0-63, or 1,5,9, or the first of --n in a row.  [default: 0]")
@click.option("--sampler", type=click.Choice(list(SAMPLERS)), default="ddim", show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--cfg", type=float, help="Guidance; 1 is none.  [default: 2; of words 5]")
@click.option("--eta", type=click.FloatRange(0, 1), help="Fresh noise in ddim, from 0 to 1.  [default: 0]")
@click.option("--init", type=File, help="Begin with this picture, noised as far as --strength says.")
@click.option("--strength", type=click.FloatRange(0, 1), help="0 keeps --init, 1 forgets it.  [default: 0.6; with --mask 1]")
@click.option("--mask", type=File, help="Draw --init anew where this picture is white, and leave it where it is black.")
@click.option("--interpolate", type=click.IntRange(min=1), metavar="N", help="N pictures from each seed, or prompt, to the next.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures at once.")
@click.option(
    "--out", type=File, help="PNG: a grid, a row for each class or prompt if there are several.  [default: samples.png]"
)
@click.option("--gif", type=File, help="GIF: noise becoming pictures; with --interpolate, the pictures in turn.")
@click.option("--npz", type=File, help="NumPy file: images (N, H, W[, C]) uint8, and labels (which class, or which prompt).")
@click.option("--attention", type=File, help="PNG: where each word of a prompt was looked at, for the first seed.")
@device
@as_json
def sample(
    run: str,
    classes: list[int] | str | None,
    prompts: tuple[str, ...],
    negative: str | None,
    n: int | None,
    seeds: list[int] | None,
    sampler: str,
    steps: int,
    cfg: float | None,
    eta: float | None,
    init: Path | None,
    strength: float | None,
    mask: Path | None,
    interpolate: int | None,
    batch_size: int,
    out: Path | None,
    gif: Path | None,
    npz: Path | None,
    attention: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw with RUN, a run folder, or with the model that is shipped: digits.

    A run of text-to-image draws what --prompt says.
    """
    from tinydiff import __version__
    from tinydiff.diffusion import noise_source
    from tinydiff.pipeline import sample_labels
    from tinydiff.prompts import GUIDANCE, TextPipeline, load_pipeline

    check_device(device)
    if eta is not None and sampler != "ddim":
        raise click.UsageError(f"--eta is for the sampler ddim, not {sampler}; leave it out")
    if init is None and (mask is not None or strength is not None):
        raise click.UsageError(f"--{'mask' if mask is not None else 'strength'} says what becomes of a picture; give --init too")
    if cfg is not None and not np.isfinite(cfg):
        raise click.BadParameter(f"{cfg} is not a finite number; 1 is no guidance", param_hint="--cfg")
    if out is None and gif is None and npz is None:
        out = Path("samples.png")
    files = [path for path in (out, gif, npz, attention) if path is not None]
    for path in files:
        check_out(path)
    pipeline = load_pipeline(run, device)
    if isinstance(pipeline, TextPipeline):
        if classes is not None or not prompts:
            raise click.UsageError(f"{run} is told words; say what to draw with --prompt" + (", not --class" if classes else ""))
        chosen = list(range(len(prompts)))
    else:
        if prompts or negative is not None or attention is not None:
            raise click.UsageError(f"{run} knows no words; leave out --prompt, --negative and --attention")
        chosen = _classes(classes, pipeline.class_names)
    cfg = cfg if cfg is not None else GUIDANCE if prompts else 2.0
    if interpolate is not None and len(chosen) > 1 and not prompts:
        raise click.UsageError("--interpolate stays within one class, as nothing lies between two; give one, such as --class 3")
    through = interpolate if len(prompts) > 1 else None  # a way from prompt to prompt, with one noise
    if through is not None:
        if n is not None or (seeds and len(seeds) > 1):
            raise click.UsageError("--interpolate between prompts keeps one noise; give one of --seeds, and no --n")
        n, interpolate = 1, None
    if n is None:
        n = len(seeds) if seeds and len(seeds) > 1 else 8 * max(1, len(chosen))
    seeds = seeds or [0]
    if len(seeds) == 1:
        seeds = list(range(seeds[0], seeds[0] + n))
    if len(seeds) != n:
        raise click.UsageError(f"--n is {n}, but --seeds gives {len(seeds)}; give as many, or only the first")
    labels = sample_labels(chosen, n) if chosen else None
    picture, cover = _begin(init, mask, pipeline.space.shape)
    strength = strength if strength is not None else 0.6 if init is not None and mask is None else 1.0
    noise = None
    if interpolate is not None:
        noise = _path(noise_source(seeds, pipeline.space.size)(), interpolate, sampler, eta)
        n = len(noise)
        labels = None if labels is None else np.repeat(labels[:1], n)
    frames: list[np.ndarray] | None = [] if gif and interpolate is None and through is None else None
    evaluations = 2 * steps - 1 if sampler == "heun" else steps
    with progress("drawing") as update:
        done, pictures_in_all = 0, n if through is None else through * (len(prompts) - 1) + 1

        def count(pictures: int) -> None:
            nonlocal done
            done += pictures
            update(done, pictures_in_all * steps, f"{evaluations} evaluations a picture")

        common: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": cfg, "eta": eta}
        given: dict[str, Any] = {
            "picture": picture,
            "strength": strength,
            "mask": cover,
            "batch_size": batch_size,
            "callback": count,
        }
        own_seeds = seeds if noise is None else [0] * len(noise)  # the path is all the noise there is
        if not isinstance(pipeline, TextPipeline):
            drawn = pipeline.draw(labels, own_seeds, noise=noise, frames=frames, **common, **given)
        elif through is not None:
            drawn = pipeline.walk(prompts, through, seeds[0], negative=negative or "", **common, **given)
            n, labels = len(drawn), None
        else:
            assert labels is not None
            told = [prompts[label] for label in labels]
            more: dict[str, Any] = {"noise": noise, "frames": frames, "negative": negative or ""}
            drawn = pipeline.draw(told, own_seeds, **more, **common, **given)
    settings = {
        "run": run,
        **({"prompt": list(prompts)} if prompts else {"class": chosen}),
        **({"negative": negative} if negative is not None else {}),
        "seeds": _spans(seeds),
        "sampler": sampler,
        "steps": steps,
        "guidance": cfg,
        **({"eta": eta} if eta is not None else {}),
        **({"init": str(init), "strength": strength} if init is not None else {}),
        **({"mask": str(mask)} if mask is not None else {}),
        **({"interpolate": interpolate or through} if interpolate or through else {}),
        "weights": pipeline.hash,
    }
    if interpolate is not None or through is not None:
        frames = [picture[None] for picture in drawn]
    made = settings | {"software": f"tinydiff {__version__}"}
    _write(drawn, labels, frames, made, out, gif, npz)
    if attention is not None and isinstance(pipeline, TextPipeline):
        from tinydiff.figures import attention_figure

        looks = [pipeline.look(prompt, seeds[0], negative=negative or "", **common) for prompt in dict.fromkeys(prompts)]
        unheard = ("init", "strength", "mask", "interpolate")  # each picture is drawn from the first seed's noise alone
        alone = {name: value for name, value in made.items() if name not in unheard} | {"seeds": str(seeds[0])}
        attention_figure(looks, attention, alone)
    print(json.dumps(settings | {"n": n, "files": [str(f) for f in files]}) if as_json else "\n".join(map(str, files)))


def _classes(asked: list[int] | str | None, names: list[str]) -> list[int]:
    """The classes to draw. Raises click.UsageError for one that the model doesn't have."""
    if not isinstance(asked, list):
        if asked is not None and not names:
            raise click.UsageError("this model was trained without classes; leave --class out")
        return list(range(len(names)))
    if not names:
        raise click.UsageError("this model was trained without classes; leave --class out")
    for number in asked:
        if number >= len(names):
            raise click.UsageError(f"--class {number}: the model knows classes 0 to {len(names) - 1}")
    return list(dict.fromkeys(asked))


def _begin(init: Path | None, mask: Path | None, shape: tuple[int, int, int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The picture to begin with, uint8 of `shape`, and the mask, True where it is white; both scaled and cropped if need be."""
    from tinydiff import images

    if init is None:
        return None, None
    picture = images.read_image(init, channels=shape[2])
    whole, size = picture.shape[:2], None if picture.shape == shape or shape[0] != shape[1] else shape[0]
    if size is not None:
        picture = images.read_image(init, size, shape[2])
    if mask is None:
        return picture, None
    cover = images.read_image(mask, channels=1)
    if cover.shape[:2] != whole:
        raise click.UsageError(
            f"{mask} has {' × '.join(map(str, cover.shape[:2]))} pixels and {init} {' × '.join(map(str, whole))}; "
            "make the mask as large as the picture"
        )
    return picture, (cover if size is None else images.read_image(mask, size, 1))[..., 0] >= 128


def _path(ends: np.ndarray, steps: int, sampler: str, eta: float | None) -> np.ndarray:
    """Noise on the way from each of `ends` to the next, in so many steps."""
    from tinydiff.diffusion import slerp

    if len(ends) < 2:
        raise click.UsageError("--interpolate goes from one seed to the next; give two or more, such as --seeds 3,17")
    if sampler in STOCHASTIC or eta:
        raise click.UsageError(f"--interpolate needs the same noise all the way, and {sampler} adds fresh one; choose ddim")
    shares = [i / steps for i in range(steps)]
    return np.concatenate([*(slerp(a, b, shares) for a, b in pairwise(ends)), ends[-1:]])


def _spans(numbers: list[int]) -> str:
    """ "0-63" for a row of numbers, else "1,5,9"."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def _write(
    drawn: np.ndarray,
    labels: np.ndarray | None,
    frames: list[np.ndarray] | None,
    settings: dict[str, Any],
    out: Path | None,
    gif: Path | None,
    npz: Path | None,
) -> None:
    from tinydiff import images, io
    from tinydiff.pipeline import sheet

    scale = max(1, 64 // max(drawn.shape[1:3]))
    if out is not None:
        images.save_png(out, sheet(drawn, labels, scale), settings)
    if gif is not None and frames is not None:
        shown = labels if len(frames[0]) == len(drawn) else None
        images.save_gif(gif, [sheet(frame, shown, scale) for frame in frames], 0.06, hold=2.0)
    if npz is not None:
        pictures = drawn[..., 0] if drawn.shape[-1] == 1 else drawn
        with io.replacing(npz) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, images=pictures, labels=np.zeros(0, np.int64) if labels is None else labels)
