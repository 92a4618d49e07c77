"""`python -m benchmarks SUITE`: see README's chapter "Speed"."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import harness
from tinydiff.cli.options import Setting

SUITES = ("conv", "ops", "train", "sample", "autoencoder", "clip", "words", "overhead", "scaling", "start")

ON_DEVICES = ("conv", "train", "sample")


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every suite has."""
    for option in reversed(
        [
            click.option("--against", type=click.Choice(["torch"]), help="measure this opponent in the same run"),
            click.option("--json", "json_file", type=click.Path(dir_okay=False), help="write the rows to FILE"),
            click.option("--threads", type=click.IntRange(1), help="threads for both sides (default: all)"),
            click.option("--repeat", type=click.IntRange(1), default=9, show_default=True, help="measurements of each side"),
            click.option("--quick", is_flag=True, help="fewer cases and measurements, to see that it works"),
        ]
    ):
        command = option(command)
    return command


def on_device(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of suites that run on a GPU too."""
    from benchmarks.gpu import CARDS
    from tinydiff.backend import DEVICES

    for option in reversed(
        [
            click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True),
            click.option(
                "--card", type=click.Choice(list(CARDS)), default="a100", show_default=True, help="whose roofline is shown"
            ),
        ]
    ):
        command = option(command)
    return command


def finish(bench: harness.Bench, json_file: str | None) -> None:
    """Print the table on stdout and write the rows."""
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(harness.table(bench.rows, bench))
    if json_file:
        harness.save(json_file, bench.rows)


def start(
    against: str | None, threads: int | None, repeat: int, quick: bool, device: str = "cpu", card: str = "a100"
) -> harness.Bench:
    """The bench with the settings of the command line."""
    return harness.Bench(harness.Settings(against, threads, repeat, quick, device=device, card=card))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Time tinydiff's kernels, ops and training, alone or against PyTorch.

    Both sides are checked to compute the same, then timed alternately with the same threads. A ratio is their time over ours.
    """


def suite(name: str) -> None:
    """Make the command of a suite that has no options of its own."""

    @main.command(name, help=(import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0])
    @common
    @(on_device if name in ON_DEVICES else lambda command: command)
    def _(json_file: str | None, **settings: Any) -> None:
        bench = start(**settings)
        import_module(f"benchmarks.{name}").run(bench)
        finish(bench, json_file)


for _name in SUITES[1:]:
    suite(_name)


@main.command("conv")
@common
@click.option("--shape", "shapes", multiple=True, metavar="N,H,W,C,O,K,S,P", help="a shape of your own instead (repeatable)")
@click.option("--kernel", "files", multiple=True, type=click.Path(exists=True, dir_okay=False), help="a file of your kernels")
@on_device
def conv_command(
    shapes: tuple[str, ...], files: tuple[str, ...], json_file: str | None, device: str, card: str, **settings: Any
) -> None:
    """Convolution in all three directions, and a row per algorithm; on a GPU, per version of the CUDA kernels."""
    from benchmarks import conv

    chosen = [conv.Shape.parse(text) for text in shapes]
    if device != "cpu":
        if files:
            raise click.UsageError("--kernel takes kernels for the CPU; those for a GPU are in csrc/")
        return cuda_conv_command(chosen, json_file, device, card, **settings)
    for file in files:
        conv.load_kernels(file)
    bench = start(**settings)
    conv.run(bench, chosen)
    finish(bench, json_file)


def cuda_conv_command(
    shapes: list[Any],
    json_file: str | None,
    device: str,
    card: str,
    against: str | None,
    threads: int | None,
    repeat: int,
    quick: bool,
) -> None:
    """The CUDA kernels one by one."""
    from benchmarks import cuda_conv
    from benchmarks.gpu import CARDS

    session = cuda_conv.Session(device, CARDS[card], repeat, against, quick)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    rows = cuda_conv.run(session, shapes or cuda_conv.shapes_for(device, quick), console)
    if json_file:
        harness.save(json_file, rows)


@main.command("all")
@common
@click.option("--out", type=click.Path(file_okay=False), default="runs/benchmarks", show_default=True, help="folder for figures")
def all_command(out: str, json_file: str | None, **settings: Any) -> None:
    """Every suite, and the figures."""
    from benchmarks import figures, train

    bench = start(**settings)
    for name in SUITES:
        import_module(f"benchmarks.{name}").run(bench)
        if json_file:  # a long run that is stopped leaves what it had
            harness.save(json_file, bench.rows)
    figures.draw(bench.rows, Path(out))
    figures.step_profile(train.profile("small", 64), Path(out) / "step.png")
    finish(bench, json_file)


@main.command("compare")
@click.argument("before", type=click.Path(exists=True, dir_okay=False))
@click.argument("after", type=click.Path(exists=True, dir_okay=False))
def compare_command(before: str, after: str) -> None:
    """Two JSON files of rows, side by side."""
    (Console() if sys.stdout.isatty() else Console(width=160)).print(harness.compare(harness.read(before), harness.read(after)))


@main.command("profile")
@click.option("--preset", type=click.Choice(["small", "base"]), default="small", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), help="also draw it, as PNG")
@click.option("--threads", type=click.IntRange(1), help="threads (default: all)")
def profile_command(preset: str, batch: int, out: str | None, threads: int | None) -> None:
    """Where a training step's time goes."""
    from benchmarks import figures, train

    start(None, threads, 1, True)
    found = train.profile(preset, batch)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(found.table())
    if out:
        figures.step_profile(found, Path(out), f"a training step: {preset}, batch {batch}")


@main.command("quality")
@click.option("--engine", type=click.Choice(["tinydiff", "torch"]), required=True)
@click.option("--data", required=True, help="as `tinydiff train` takes it, such as digits or mnist:DIR")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="run folder")
@click.option("--preset", default="small", show_default=True)
@click.option("--n", type=click.IntRange(2), default=2000, show_default=True, help="pictures to judge")
@click.option("--set", "options", multiple=True, type=Setting(), help="another setting of the recipe, as `tinydiff train` has it")
@click.option("--threads", type=click.IntRange(1), help="threads (default: all)")
def quality_command(threads: int | None, engine: str, options: tuple[tuple[str, Any], ...], **settings: Any) -> None:
    """The same minutes of the same recipe on either engine, judged alike, beside what ten minutes on MNIST are to reach."""
    from benchmarks.quality import quality

    start("torch" if engine == "torch" else None, threads, 1, True)
    print(json.dumps(quality(engine, options=dict(options), **settings)))


def cli() -> None:
    """Run, with a user's mistakes as one line on stderr."""
    try:
        main(prog_name="python -m benchmarks")
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        if isinstance(error, RuntimeError | ValueError | OSError):
            print(f"benchmarks: error: {error}", file=sys.stderr)
            sys.exit(1)
        raise


if __name__ == "__main__":
    cli()
