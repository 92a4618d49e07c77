"""`tinydiff train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from tinydiff.cli.options import SPECS, Setting, as_json, check_device, device, find, progress

# What the last showing may have measured.
FIGURES = ("accuracy", "recall_1", "recall_10", "psnr", "ssim", "mse")

STUCK = "do the captions belong to the pictures? If so, try a lower --lr or another --seed, or train longer"
REVIVE = "train longer, with a smaller --kl, or be content with fewer (--latent)"


@click.command()
@click.argument("task")
@click.option("--out", "out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="Folder for the run.")
@click.option("--data", help=f"{SPECS}.  [default: digits]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Train about as long.  [default: 10]")
@click.option("--steps", type=click.IntRange(min=1), help="Train that many steps instead.")
@click.option("--preset", help="small or base; of an autoencoder also lecture, of clip also vit.  [default: small]")
@click.option("--seed", type=click.IntRange(min=0), help="Fixes everything random.  [default: 0]")
@click.option("--size", type=click.IntRange(min=1), help="Height and width to which pictures are scaled, or drawn.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Pictures a step.")
@click.option("--lr", type=float, help="Highest learning rate.")
@click.option("--predict", help="What the denoiser answers: noise, v or x0.")
@click.option("--schedule", help="How much noise at which time: linear, scaled_linear, cosine or karras.")
@click.option("--times", help="How times are drawn: uniform, lognormal or logit_normal.")
@click.option("--min-snr", type=float, help="Turn min-SNR weighting on, with this γ (5 is usual).")
@click.option("--latents", metavar="AE_RUN", help="Denoise the latents of this run of an autoencoder, in place of pixels.")
@click.option("--text", metavar="CLIP_RUN", help="Of text-to-image: the run whose text encoder is listened to.")
@click.option(
    "--factor", type=click.IntRange(min=1), help="How much lower and narrower an autoencoder's latents are.  [default: 4]"
)
@click.option("--latent", type=click.IntRange(min=1), help="Channels of an autoencoder's latents.  [default: 4]")
@click.option(
    "--kl", type=click.FloatRange(min=0), help="Weight of the KL divergence; 0 is a plain bottleneck.  [default: 0.0001]"
)
@click.option("--set", "settings", multiple=True, type=Setting(), help="Any other setting; model.NAME for the network's.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@device
@as_json
def train(task: str, out: Path, minutes: float | None, steps: int | None, preset: str | None, **given: Any) -> None:
    """Train TASK (denoiser, classifier, autoencoder, clip or text-to-image), into a run folder.

    Ctrl-C saves; the same command with --resume goes on as if it had never stopped.
    """
    from tinydiff.run import Run
    from tinydiff.tasks import TASKS, configure, make_task
    from tinydiff.train import Trainer

    find(TASKS, task, "task")
    device = given.pop("device")
    check_device(device)
    resume, json_wanted = given.pop("resume"), given.pop("as_json")
    options = dict(given.pop("settings")) | {name: value for name, value in given.items() if value is not None}
    if steps is not None and minutes is not None:
        raise click.UsageError("--steps and --minutes exclude each other; give one")
    options |= {"steps": steps} if steps is not None else {"minutes": minutes} if minutes is not None else {}
    again = "" if device == "cpu" else f" --device {device}"
    made = None
    if resume:
        if not (out / "config.json").exists():
            raise click.UsageError(f"{out} holds no run to resume; leave out --resume to start one")
        run = Run.open(out)
        _agree(run.config, {"task": task} | options | ({"preset": preset} if preset is not None else {}), out)
    else:
        try:
            config = configure(task, preset or "small", options)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        made = make_task(config)
        Trainer(made, 1, device).gradients()  # what can't be trained leaves no folder behind
        for note in made.notes:
            print(f"tinydiff: {note}", file=sys.stderr)
        run = Run.create(out, config)
    result = train_with_progress(run, f"tinydiff train {task} --out {out} --resume{again}", made, device)
    print(json.dumps(result) if json_wanted else describe(out, result))


def _agree(config: dict[str, Any], options: dict[str, Any], out: Path) -> None:
    """Refuse options that differ from what the run was started with."""
    for name, value in options.items():
        before = config["model"].get(name.removeprefix("model.")) if name.startswith("model.") else config.get(name)
        if before != value:
            raise click.UsageError(
                f"{out} was started with {name} = {before!r}, not {value!r}; leave it out, or choose another --out"
            )


def describe(out: Path, result: dict[str, Any]) -> str:
    """One line about a finished training."""
    figures = ", ".join(f"{name} {result[name]:.4f}" for name in ("loss", *FIGURES) if name in result)
    return f"{out}: {result['steps']} steps in {result['seconds']:.0f} s, {figures}, weights {result['weights']}"


def train_with_progress(run: Any, again: str, task: Any = None, device: str = "cpu") -> dict[str, Any]:
    """Train or go on, and warn if little was learnt; `again` is the command that goes on after an interruption.

    Returns the last step's figures.
    """
    from tinydiff.pipeline import load_model, weights_hash
    from tinydiff.train import Interrupted, Trainer
    from tinydiff.train import train as run_training

    last: dict[str, Any] = {}
    losses: list[float] = []
    with progress("training") as update:

        def report(trainer: Trainer, row: dict[str, float]) -> None:
            losses.append(row["loss"])
            last.update(row)
            update(trainer.step, trainer.total, f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")

        try:
            trainer = run_training(run, report, task, device)
        except Interrupted as stop:
            print(f"tinydiff: {stop}. To go on: {again}", file=sys.stderr)
            raise click.exceptions.Exit(128 + stop.signal) from None  # as shells count
    if last.get("dead_channels"):
        print(f"tinydiff: warning: {last['dead_channels']} channels of the latents carry nothing; {REVIVE}", file=sys.stderr)
    if last.get("guessing"):
        print(f"tinydiff: warning: the loss is that of guessing among a batch; {STUCK}", file=sys.stderr)
    tail = losses[-100:]
    model, _ = load_model(run.path)
    return {
        "run": str(run.path),
        "steps": trainer.total,
        "seconds": round(trainer.seconds, 3),
        "loss": sum(tail) / len(tail),
        **{name: last[name] for name in (*FIGURES, "dead_channels", "guessing") if name in last},
        "weights": weights_hash(model),
    }
