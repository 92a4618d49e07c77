"""What several commands share: parsing lists of numbers, progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from tinydiff.names import choose

T = TypeVar("T")
MOST = 1_000_000  # pictures in one call
SPECS = "digits, shapes[:N], pictures, page, pairs:PAGE.html, mnist:DIR, fashion:DIR or folder:DIR"  # as `data.SPECS`


def find(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, as `choose`. Raises click.UsageError for an unknown name."""
    try:
        return choose(table, name, what)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


class Setting(click.ParamType):
    """NAME=VALUE, the value as JSON or, failing that, as text."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """(name, value)"""
        name, equals, text = value.partition("=")
        if not equals or not name:
            self.fail(f"{value!r}: write NAME=VALUE, such as lr=0.001", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


class Numbers(click.ParamType):
    """Numbers from 0 as "7", "0,1,4", "0-63", mixed as one likes; or, where `words` allow it, one of these."""

    name = "numbers"

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A list of numbers, or the word."""
        if not isinstance(value, str) or value in self.words:
            return value
        numbers: list[int] = []
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            if not (first.isdecimal() and (last.isdecimal() or not dash)):
                also = "".join(f", or {word}" for word in self.words)
                self.fail(f"{value!r}: write 7, or 0,1,4, or 0-63{also}", param, ctx)
            span = range(int(first), int(last or first) + 1)
            if not span:
                self.fail(f"{value!r}: {part.strip()} runs backwards; write {last}-{first}", param, ctx)
            if len(numbers) + (span.stop - span.start) > MOST:
                self.fail(f"{value!r}: more than {MOST:,} numbers; do it in parts", param, ctx)
            numbers += span
        return numbers


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with the time left, on stderr if that is a terminal; call what it gives with (done, of, a note)."""
    if not sys.stderr.isatty():
        yield lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """A block in which a warning is one line on stderr, and said once."""
    import warnings

    said: set[str] = set()

    def say(message: Warning | str, *where: Any, **more: Any) -> None:
        line = " ".join(str(message).split())
        if line not in said:
            print("tinydiff: warning:", line, file=sys.stderr)
        said.add(line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = say
        yield


device = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda or cudasim.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def check_device(name: str) -> None:
    """Refuse a device that isn't there. Raises click.BadParameter."""
    from tinydiff import backend

    try:
        backend.check_device(name)
    except (ValueError, RuntimeError) as error:
        raise click.BadParameter(str(error), param_hint="--device") from None


def check_out(out: Path, *sources: Path) -> None:
    """Refuse a file to write that lies in no folder, or is one of those to read. Raises click.UsageError."""
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"{out}: there is no folder {out.parent}; make it first")
    if out.exists() and any(source.exists() and out.samefile(source) for source in sources):
        raise click.UsageError(f"{out} is what is read; choose another name to write")
