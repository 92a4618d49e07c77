"""`tinydiff demo`, `dream` and `schedules`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tinydiff.cli.options import check_device, device, progress

Folder = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--out", type=Folder, default="tinydiff-demo", show_default=True, help="Folder for the run and the pictures.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=3.0, show_default=True, help="How long to train.")
@click.option("--steps", type=click.IntRange(min=1), help="Train that many steps instead.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--classifier", default="classifier", show_default=True, help="Run folder, or the shipped one.")
def demo(out: Path, minutes: float, steps: int | None, seed: int, classifier: str) -> None:
    """Train on digits for about three minutes, then draw digits out of noise.

    Interrupted, the same command goes on; run again afterwards, it draws again.
    """
    from tinydiff.cli.train import train_with_progress
    from tinydiff.demo import draw_all
    from tinydiff.evaluate import Judge
    from tinydiff.run import Run
    from tinydiff.tasks import configure

    judge = Judge.load(classifier)
    folder = out / "run"
    if (folder / "config.json").exists():
        run = Run.open(folder)
        print(f"tinydiff: going on with {folder}; remove it to start anew", file=sys.stderr)
    else:
        out.mkdir(parents=True, exist_ok=True)
        # Small batches: in so short a time, more steps show more than smoother ones.
        options = {"seed": seed, "batch_size": 32, "showings": 2} | ({"minutes": minutes} if steps is None else {"steps": steps})
        run = Run.create(folder, configure("denoiser", "small", options))
    found = run.load_state()
    if found is None or found[1]["step"] < found[1]["steps"]:
        result = train_with_progress(run, f"tinydiff demo --out {out}")
        print(f"trained {result['steps']} steps in {result['seconds']:.0f} s, loss {result['loss']:.4f}", flush=True)
    for what, path in draw_all(run, out, judge, seed).items():
        print(f"{path}: {what}")


@click.command()
@click.option("--class", "target", type=click.IntRange(min=0), default=3, show_default=True, help="What it is to become.")
@click.option("--from", "start", type=click.Path(path_type=Path), help="A picture to start from.  [default: noise]")
@click.option("--steps", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True, help="A pixel's step.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the noise.")
@click.option("--classifier", default="classifier", show_default=True, help="Run folder, or the shipped one.")
@click.option("--out", type=Folder, default="dream", show_default=True, help="Folder for what it makes.")
@device
def dream(target: int, start: Path | None, steps: int, rate: float, seed: int, classifier: str, out: Path, device: str) -> None:
    """Change pixels by the gradient of log P(class | picture), from noise or a picture.

    Writes the film, the last picture, the curve of P, and the gradient by the pixels computed two ways.
    """
    from rich.console import Console
    from rich.table import Table

    from tinydiff import dream as dreaming
    from tinydiff import figures, images
    from tinydiff.evaluate import Judge

    check_device(device)
    judge = Judge.load(classifier, device)
    if target >= judge.classes:
        raise click.BadParameter(f"{target}: the classifier knows classes 0 to {judge.classes - 1}", param_hint="--class")
    picture = dreaming.start_picture(judge, start, seed)
    with progress("dreaming") as update:
        found = dreaming.dream(judge, target, picture, steps, rate, seed, lambda step, p: update(step, steps, f"P = {p:.3f}"))
    gradients = dreaming.pixel_gradients(judge, picture, target)

    name = judge.card["class_names"][target]
    settings = {
        "class": target,
        "from": str(start or "noise"),
        "seed": seed,
        "steps": steps,
        "rate": rate,
        "classifier": judge.hash,
    }
    out.mkdir(parents=True, exist_ok=True)
    scale = max(1, 224 // picture.shape[0])
    shown = range(0, steps + 1, max(1, steps // 150))
    images.save_gif(out / "film.gif", [found.pictures[i] for i in shown] + [found.pictures[-1]], 0.04, hold=2.0, enlarged=scale)
    images.save_png(out / "picture.png", found.pictures[-1], settings, enlarged=scale)
    figures.probability_curve(found.probabilities, name, out / "curve.png")
    figures.pixel_gradient_figure(gradients, picture, name, out / "gradient.png")

    print(f"P({name}) went from {found.probabilities[0]:.3g} to {found.probabilities[-1]:.3g} in {steps} steps")
    table = Table("gradient by the pixels", "evaluations", "milliseconds", "largest difference, relative")
    table.add_row("finite differences", f"{gradients.evaluations:,}", f"{1000 * gradients.seconds_differences:.1f}", "")
    table.add_row("one backward pass", "1", f"{1000 * gradients.seconds_backward:.1f}", f"{gradients.worst:.1e}")
    Console().print(table)
    for file in ("film.gif", "picture.png", "curve.png", "gradient.png"):
        print(out / file)


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="PNG to write.")
@click.option("--data", "spec", default="digits", show_default=True, help="Where the picture is from.")
@click.option("--index", type=click.IntRange(min=0), default=0, show_default=True, help="Which picture of the test set.")
@click.option("--base", default="cosine", show_default=True, help="The schedule under which times are drawn.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def schedules(out: Path, spec: str, index: int, base: str, seed: int) -> None:
    """Draw what each noise schedule, and each way of drawing times, does to a picture."""
    from tinydiff import data, io
    from tinydiff.diffusion.figures import draw_schedules
    from tinydiff.images import from_uint8

    test = data.load(spec, "test")
    if index >= len(test):
        raise click.BadParameter(f"{index}: {spec} has {len(test)} test pictures, from 0", param_hint="--index")
    io.write_atomic(out, draw_schedules(from_uint8(test.images[index]), base, seed))
    print(out)
