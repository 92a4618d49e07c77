"""`tinydiff score` and `search`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np

from tinydiff.cli.options import as_json, check_device, check_out, device, progress

Picture = click.Path(path_type=Path)
File = click.Path(dir_okay=False, path_type=Path)
MOST = 40  # rows and columns of a figure that can still be read


class Words(click.Command):
    """A command whose option `--captions` takes all that follows it, up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with `--captions A B` made `--captions A --captions B`."""
        spread: list[str] = []
        following = False
        for argument in args:
            if argument.startswith("--"):
                following = argument == "--captions"
                spread += [] if following else [argument]
            elif following:
                spread += ["--captions", argument]
            else:
                spread.append(argument)
        return super().parse_args(ctx, spread)


@click.command(cls=Words)
@click.argument("run")
@click.argument("pictures", nargs=-1, required=True, type=Picture, metavar="PICTURE ...")
@click.option("--captions", multiple=True, required=True, metavar="TEXT ...", help="What may be said of them.")
@click.option("--out", type=File, help="PNG: the table as a heat map.  [default: score.png]")
@device
@as_json
def score(run: str, pictures: tuple[Path, ...], captions: tuple[str, ...], out: Path | None, device: str, as_json: bool) -> None:
    """How well each caption fits each PICTURE, by RUN's encoders: the cosine of their vectors.

    tinydiff score RUN a.png b.png --captions "a hungry dinosaur" "a soaring bird"
    """
    from tinydiff import __version__, figures
    from tinydiff.contrastive import Matcher

    check_device(device)
    if max(len(pictures), len(captions)) <= MOST:
        out = out or Path("score.png")
    elif out is not None:
        raise click.UsageError(f"a heat map has at most {MOST} pictures and captions, not {len(pictures)} and {len(captions)}")
    else:
        print(f"tinydiff: no heat map is drawn, as it has at most {MOST} pictures and captions", file=sys.stderr)
    if out is not None:
        check_out(out, *pictures)
    matcher = Matcher.load(run, device)
    read = np.stack([matcher.read(path) for path in pictures])
    scores = matcher.scores(read, captions)
    if out is not None:
        settings = {"run": run, "weights": matcher.hash, "captions": captions, "pictures": list(map(str, pictures))}
        names = [path.name for path in pictures]
        figures.score_map(scores, read, captions, out, names, settings | {"software": f"tinydiff {__version__}"})
    if as_json:
        rows = [
            {"picture": str(path), "best": captions[int(row.argmax())], "scores": [round(float(score), 6) for score in row]}
            for path, row in zip(pictures, scores)
        ]
        files = [] if out is None else [str(out)]
        print(json.dumps({"run": run, "weights": matcher.hash, "captions": captions, "pictures": rows, "files": files}))
        return
    _print_table(pictures, captions, scores)
    if out is not None:
        print(out)


def _print_table(pictures: tuple[Path, ...], captions: tuple[str, ...], scores: np.ndarray) -> None:
    """Pictures by captions, the best caption of each in bold with a star."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("", *(Column(Text(caption)) for caption in captions))
    for path, row in zip(pictures, scores):
        best = int(row.argmax())
        cells = [Text(f"{score:.3f}{' *' if i == best else ''}", "bold" if i == best else "") for i, score in enumerate(row)]
        table.add_row(Text(path.name), *cells)
    Console().print(table)


@click.command()
@click.argument("run")
@click.argument("text")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--n", type=click.IntRange(min=1), default=10, show_default=True, help="How many to show.")
@device
@as_json
def search(run: str, text: str, folder: Path, n: int, device: str, as_json: bool) -> None:
    """The pictures in FOLDER that TEXT fits best, by RUN's encoders, best first."""
    from tinydiff.contrastive import BATCH, Matcher
    from tinydiff.data.folders import find_pictures

    check_device(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    matcher = Matcher.load(run, device)
    said, paths = matcher.texts([text])[0], find_pictures(folder)
    scores: dict[Path, float] = {}
    with progress("searching") as update:
        for start in range(0, len(paths), BATCH):
            read: dict[Path, np.ndarray] = {}
            for done, path in enumerate(paths[start : start + BATCH], start + 1):
                try:
                    read[path] = matcher.read(path)
                except (ValueError, OSError) as error:
                    print(f"tinydiff: skipped: {error}", file=sys.stderr)
                update(done, len(paths), "")
            if read:
                scores |= zip(read, (matcher.images(np.stack(list(read.values()))) @ said).tolist())
    if not scores:
        raise ValueError(f"there is no picture in {folder} that can be read")
    best = sorted(scores, key=lambda path: -scores[path])[:n]
    found = [{"picture": str(path), "score": round(scores[path], 6)} for path in best]
    if as_json:
        print(json.dumps({"run": run, "text": text, "searched": len(scores), "found": found}))
        return
    for row in found:
        print(f"{row['score']:7.3f}  {row['picture']}")
