"""`tinydiff eval`, `gradcheck`, `doctor` and `data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tinydiff.cli.options import as_json, check_device, device, find, progress
from tinydiff.diffusion import SAMPLERS

TOLERANCE = 1e-4  # of derivatives against central differences in float64, relative to the larger of 1 and the value


@click.command("eval")
@click.argument("run")
@click.option(
    "--n", type=click.IntRange(min=2), default=2000, show_default=True, help="Pictures to draw, or test pictures to use."
)
@click.option("--data", "spec", help="Real pictures to compare with.  [default: what it was trained on]")
@click.option("--classifier", default="classifier", show_default=True, help="The judge: a run folder, or the shipped one.")
@click.option(
    "--judge", metavar="CLIP_RUN", help="Of text-to-image: encoders, not the run's own, that find the caption of each picture."
)
@click.option("--sampler", type=click.Choice(list(SAMPLERS)), default="ddim", show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--cfg", type=float, help="Guidance; 1 is none.  [default: 2; of text-to-image 5]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures at once.")
@device
@as_json
def evaluate(
    run: str,
    n: int,
    spec: str | None,
    classifier: str,
    judge: str | None,
    sampler: str,
    steps: int,
    cfg: float | None,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """FID and accuracy of RUN's pictures, beside the floor (real against real).

    Of text-to-image, how many pictures show what their prompts, which training never saw, ask for; of named pictures, which need
    --judge, how often the caption is among the best 1, 5 and 10 of 200.

    Of a classifier, its test accuracy; of an autoencoder, PSNR, SSIM and MSE beside PCA's with as many numbers a picture.
    Of contrastive encoders, how often a picture finds its class or caption.
    """
    from tinydiff import evaluate as evaluation
    from tinydiff.faithfulness import evaluate_text_to_image
    from tinydiff.pipeline import load_model
    from tinydiff.prompts import GUIDANCE
    from tinydiff.reconstruction import evaluate_autoencoder

    check_device(device)
    task = load_model(run)[1]["task"]
    if judge is not None and task != "text-to-image":
        raise click.UsageError(f"--judge goes with a run of text-to-image, and {run} is one of {task}; leave it out")
    if task == "classifier":
        result: dict[str, Any] = evaluation.evaluate_classifier(run, n, spec, device)
    elif task == "autoencoder":
        result = evaluate_autoencoder(run, n, spec, device)
    elif task == "clip":
        from tinydiff.contrastive import evaluate_clip

        result = evaluate_clip(run, n, spec, device)
    else:
        with progress("drawing") as update:
            done = 0

            def count(pictures: int) -> None:
                nonlocal done
                done += pictures
                update(done, n * steps, "")

            guidance = cfg if cfg is not None else GUIDANCE if task == "text-to-image" else 2.0
            settings = {"sampler": sampler, "steps": steps, "guidance": guidance, "batch_size": batch_size}
            if task == "text-to-image":
                result = evaluate_text_to_image(run, n, classifier, spec, judge, device, **settings, callback=count)
            else:
                eye = evaluation.Judge.load(classifier, device)
                result = evaluation.evaluate_denoiser(run, n, eye, spec, **settings, callback=count)
            result |= settings
    if as_json:
        print(json.dumps({"run": run} | result))
        return
    names = {
        "mse_pca": "mse of PCA, as many numbers",
        "numbers": "numbers a picture",
        "floor": "floor (FID, real against real)",
        "accuracy_real": "accuracy on real pictures",
        "fid": "FID",
    }
    for name, value in ({"run": run} | result).items():
        print(f"{names.get(name, name):32}{_shown(value)}")


def _shown(value: Any) -> Any:
    """Four figures after the point, or four significant ones of what is small."""
    return value if not isinstance(value, float) else f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.4g}"


@click.command()
@click.argument("ops", nargs=-1, metavar="[OP ...]")
@as_json
@click.pass_context
def gradcheck(ctx: click.Context, ops: tuple[str, ...], as_json: bool) -> None:
    """The worst error of first and second derivatives of each OP (all, if none is named), against central differences."""
    import math

    from rich.console import Console
    from rich.table import Table

    from tinydiff.gradcheck import worst_errors
    from tinydiff.samples import SAMPLES

    for name in ops:
        find(SAMPLES, name, "op")
    rows: list[dict[str, Any]] = []
    chosen = list(ops) or sorted(SAMPLES)
    with progress("checking") as update:
        for done, name in enumerate(chosen, 1):
            first, second = worst_errors(name)
            none = math.isnan(first) and math.isnan(second) and not any(s.differentiable for s in SAMPLES[name])
            good = none or (first <= TOLERANCE and second <= TOLERANCE)
            rows.append({"op": name, "first": None if none else first, "second": None if none else second, "ok": good})
            update(done, len(chosen), name)
    if as_json:
        print(json.dumps(rows))
    else:
        table = Table("op", "first derivatives", "second derivatives", "")
        for row in rows:
            errors = ["none" if row[key] is None else f"{row[key]:.1e}" for key in ("first", "second")]
            table.add_row(row["op"], *errors, "ok" if row["ok"] else f"above {TOLERANCE:.0e}")
        Console().print(table)
    if not all(row["ok"] for row in rows):
        ctx.exit(1)


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """What this machine computes with, what is missing, and the fix."""
    from dataclasses import asdict

    from tinydiff.doctor import examine

    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    for finding in findings:
        mark = {"ok": " ", "missing": "-", "warning": "!"}[finding.status]
        print(f"{mark} {finding.what:18}{finding.found}" + (f"\n{'':20}→ {finding.fix}" if finding.fix else ""))


@click.group()
def data() -> None:
    """Get data sets, and look at them."""


@data.command()
@click.argument("name")
@click.option("--out", "folder", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: ./NAME]")
@click.option("--base-url", help="Download from here instead of the usual mirrors.")
def fetch(name: str, folder: Path | None, base_url: str | None) -> None:
    """Download mnist or fashion, with checksums. The only command that opens a connection."""
    from tinydiff import data as datasets

    folder = folder or Path(name)
    datasets.fetch(name, folder, base_url, print)
    print(f"use it with --data {name}:{folder}")


@data.command()
@click.argument("spec", default="digits")
@click.option("--size", type=click.IntRange(min=1), help="Height and width to which pictures are scaled, or drawn.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="PNG to draw the first pictures to.")
@click.option("--n", type=click.IntRange(1, 10_000), default=96, show_default=True, help="How many of them.")
@as_json
def info(spec: str, size: int | None, out: Path | None, n: int, as_json: bool) -> None:
    """What is in SPEC: digits, shapes, pictures, page, mnist:DIR, folder:DIR, …"""
    from tinydiff import data as datasets
    from tinydiff import images

    train, test = datasets.load(spec, "train", size), datasets.load(spec, "test", size)
    counts = {} if train.labels is None else {name: int((train.labels == i).sum()) for i, name in enumerate(train.class_names)}
    result: dict[str, Any] = {
        "data": spec,
        "train": len(train),
        "test": len(test),
        "shape": list(train.images.shape[1:]),
        "classes": counts,
        "captions": [] if train.captions is None else [train.captions[i][0] for i in range(min(3, len(train)))],
        "notes": [*train.notes, *test.notes],
    }
    if out is not None:
        enlarged = max(1, 64 // train.images.shape[1])
        images.save_png(out, images.grid(train.images[:n], columns=12, background=160), enlarged=enlarged)
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v:,}" for k, v in value.items())
        elif name in ("captions", "notes"):
            value = " | ".join(value)
        print(f"{name:10}{value or 'none'}")


@data.command()
@click.argument("page", type=click.Path(path_type=Path))
@click.option("--size", type=click.IntRange(1, 4096), default=64, show_default=True, help="Height and width of the pictures.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="PNG to draw the pictures to, in their order.")
@as_json
def pairs(page: Path, size: int, out: Path | None, as_json: bool) -> None:
    """What --data pairs:PAGE finds: each <img> with an alt text of a saved web page, or of a folder of pages.

    Opens no connection, and no file outside the page's folder.
    """
    import numpy as np

    from tinydiff import images
    from tinydiff.data import read_pairs

    found = read_pairs(page, size)
    rows = [{"picture": source, "captions": captions} for source, captions in zip(found.sources, found.captions)]
    if out is not None and rows:
        images.save_png(out, images.grid(np.stack(found.pictures), background=160))
    if as_json:
        print(json.dumps({"images": found.images, "pairs": rows, "skipped": dict(found.skipped)}))
        return
    for row in rows:
        print(f"{row['picture']:40}  {' | '.join(row['captions'])}")
    print(found)
    print(f"use it with --data pairs:{page}" if rows else "no pair of a picture and a caption, so nothing to train on")
