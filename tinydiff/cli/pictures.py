"""`tinydiff demo`, `dream` and `schedules`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinydiff.cli.options import check_device, device, progress

if TYPE_CHECKING:
    from tinydiff.run import Run

Folder = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--out", type=Folder, help="Folder for runs and pictures.  [default: tinydiff-demo; with --words tinydiff-words]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long to train.  [default: 3; with --words 15]")
@click.option("--steps", type=click.IntRange(min=1), help="Train that many steps instead.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--classifier", default="classifier", show_default=True, help="Run folder, or the shipped one.")
@click.option("--words", is_flag=True, help="Train an autoencoder and a text encoder too, and draw what is typed.")
@click.option("--prompt", "prompts", multiple=True, help="With --words: draw this; otherwise it asks.")
def demo(
    out: Path | None,
    minutes: float | None,
    steps: int | None,
    seed: int,
    classifier: str,
    words: bool,
    prompts: tuple[str, ...],
) -> None:
    """Train on digits for about three minutes, then draw digits out of noise.

    With --words, for fifteen: first an autoencoder, then two encoders on pictures and captions, then a denoiser of the
    autoencoder's latents that listens to the encoder for text; then it draws what you type.

    Interrupted, the same command goes on; run again afterwards, it draws again.
    """
    from tinydiff.demo import draw_all, draw_words
    from tinydiff.evaluate import Judge

    if prompts and not words:
        raise click.UsageError("--prompt goes with --words")
    out = out or Path("tinydiff-words" if words else "tinydiff-demo")
    again = f"tinydiff demo{' --words' if words else ''} --out {out}"
    minutes = minutes or (15.0 if words else 3.0)

    def options(share: float) -> dict[str, Any]:
        return {"seed": seed, "showings": 2} | ({"minutes": minutes * share} if steps is None else {"steps": steps})

    # Small batches: in so short a time, more steps show more than smoother ones.
    small = {"batch_size": 32}
    if not words:
        judge = Judge.load(classifier)
        run = _trained(out / "run", "denoiser", options(1) | small, again)
        for what, path in draw_all(run, out, judge, seed).items():
            print(f"{path}: {what}")
        return
    _trained(out / "autoencoder", "autoencoder", options(0.2), again)
    _trained(out / "clip", "clip", options(0.2), again)
    parts = {"latents": str(out / "autoencoder"), "text": str(out / "clip")}
    run = _trained(out / "run", "text-to-image", options(0.6) | small | parts, again)
    asking = not prompts and sys.stdin.isatty()
    chosen = list(prompts) or ["draw me a seven", "3, by hand", "it looks like an eight", "my child's first two"]
    while chosen:
        print(f"{draw_words(run, out, chosen, seed)}: a row each for {', '.join(map(repr, chosen))}", flush=True)
        answer = click.prompt("draw what? (nothing: the end)", default="", show_default=False) if asking else ""
        chosen = [answer] if answer else []


def _trained(folder: Path, task: str, options: dict[str, Any], again: str) -> Run:
    """The run in `folder`, made and trained as far as it isn't yet; `again` is the command that goes on after an interruption."""
    from tinydiff.cli.train import train_with_progress
    from tinydiff.run import Run
    from tinydiff.tasks import configure

    if (folder / "config.json").exists():
        run = Run.open(folder)
        print(f"tinydiff: going on with {folder}; remove it to start anew", file=sys.stderr)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        run = Run.create(folder, configure(task, "small", options))
    found = run.load_state()
    if found is None or found[1]["step"] < found[1]["steps"]:
        result = train_with_progress(run, again)
        print(f"trained {task}: {result['steps']} steps in {result['seconds']:.0f} s, loss {result['loss']:.4f}", flush=True)
    return run


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
    figures.probability_curve(found.probabilities, name, out / "curve.png", settings)
    figures.pixel_gradient_figure(gradients, picture, name, out / "gradient.png", settings)

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
