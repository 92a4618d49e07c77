"""Pictures with captions from saved web pages: every `<img src alt>` whose picture lies beside the page, or inside it.

Nothing is ever fetched, and no file outside the page's folder is opened, whatever the page says. What is left out is counted, by
reason.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from lxml import etree

from tinydiff.data.captions import Captions
from tinydiff.data.dataset import Dataset
from tinydiff.data.split import held_out
from tinydiff.data.svg import is_svg, read_svg
from tinydiff.images import read_image

PAGES = {".html", ".htm", ".xhtml"}
MAX_PAGE_BYTES = 256 * 2**20
MAX_PICTURE_BYTES = 64 * 2**20
ENOUGH = 200  # pictures, from which on some are held out for the test


@dataclass
class Pairs:
    """What was found in a page, or in a folder of them.

    Attributes:
        sources: where each picture is from, as the page writes it; `data:` URIs only as "data:image/png, …".
        pictures: of each, uint8 (size, size, 3).
        captions: of each, at least one.
        images: how many `<img>` there were.
        skipped: how many of them were left out, by reason.
        examples: for each reason, the first that it applied to.
    """

    sources: list[str] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        count = sum(map(len, self.captions))
        reasons = ", ".join(f"{n} {reason} (such as {self.examples[reason]})" for reason, n in self.skipped.most_common())
        skipped = f"; {self.skipped.total()} skipped: {reasons}" if self.skipped else ""
        return f"{len(self.pictures)} pictures with {count} captions, of {self.images} <img>{skipped}"


class Skip(Exception):
    """An `<img>` that is no pair: `reason`, the same words each time, and what it applies to."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason, self.what = reason, what


def read_pairs(path: str | Path, size: int) -> Pairs:
    """The pairs of a page, or of all pages in a folder and its subfolders; the pictures scaled and cropped to size × size.

    The same picture with several captions is one picture; the same picture with the same caption counts once. Raises
    FileNotFoundError if there is no such page or folder, ValueError if there is no page in it or one is too large.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        root = path.resolve()
        pages = sorted(page for page in path.rglob("*") if page.suffix.lower() in PAGES and _inside(page, root) is not None)
        if not pages:
            raise ValueError(f"no page in {path} ({', '.join(sorted(PAGES))})")
    elif path.is_file():
        root, pages = path.parent.resolve(), [path]
    else:
        raise FileNotFoundError(f"no such page or folder: {path}")
    found = Pairs()
    known: dict[bytes, int | Skip] = {}  # what became of a picture's content
    for page in pages:
        for attributes in _images(page):
            found.images += 1
            try:
                _add(found, known, attributes, page, root, size)
            except Skip as skip:
                found.skipped[skip.reason] += 1
                found.examples.setdefault(skip.reason, skip.what)
    return found


def _add(found: Pairs, known: dict[bytes, int | Skip], attributes: dict[str, str], page: Path, root: Path, size: int) -> None:
    source = attributes.get("src", "").strip(" \t\r\n\f")
    shown = source.partition(",")[0] + ", …" if source[:5].lower() == "data:" else source
    shown = shown if len(shown) <= 60 else shown[:59] + "…"
    if not source:
        raise Skip("without src", f"alt {attributes.get('alt')!r}")
    if "alt" not in attributes:
        raise Skip("without alt", shown)
    caption = " ".join(attributes["alt"].split())
    if not caption:
        raise Skip("with an empty alt", shown)
    content = _content(source, shown, page, root)
    digest = hashlib.sha256(content).digest()
    if digest not in known:
        try:
            picture = read_svg(content, size) if is_svg(content) else read_image(content, size)
        except (ValueError, ImportError) as error:
            reason = "SVG without the extra tinydiff[pictures]" if isinstance(error, ImportError) else "broken or no picture"
            known[digest] = Skip(reason, f"{shown}: {error}" if isinstance(error, ValueError) else shown)
        else:
            known[digest] = len(found.pictures)
            found.sources.append(shown)
            found.pictures.append(picture)
            found.captions.append([])
    place = known[digest]
    if isinstance(place, Skip):
        raise place
    if caption in found.captions[place]:
        raise Skip("twice the same", shown)
    found.captions[place].append(caption)


# -------------------------------------------------------------------------------------------------------------- the markup


class _Images:
    """Collects the attributes of every `<img>`: a target of lxml's parser, which builds no tree then."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "img":
            self.found.append(dict(attributes))

    def close(self) -> list[dict[str, str]]:
        return self.found


def _images(page: Path) -> list[dict[str, str]]:
    if page.stat().st_size > MAX_PAGE_BYTES:
        raise ValueError(f"{page} has {page.stat().st_size:,} bytes; pages of at most {MAX_PAGE_BYTES:,} are read")
    # Not the standard library's parser: a page of half a megabyte, made for it, takes it minutes.
    parser = etree.HTMLParser(target=_Images(), encoding="utf-8", huge_tree=True, no_network=True)
    parser.feed(_decoded(page.read_bytes()).encode())
    return parser.close()


def _decoded(content: bytes) -> str:
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace")
    said = re.search(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([\w.:-]{1,40})", content[:4096], re.IGNORECASE)
    encoding = said[1].decode() if said else "utf-8"
    try:
        return content.decode("cp1252" if encoding.lower() in ("iso-8859-1", "latin1", "ascii") else encoding, "replace")
    except (LookupError, ValueError):
        return content.decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------ the pictures


def _content(source: str, shown: str, page: Path, root: Path) -> bytes:
    """What is in the picture's file, or in its `data:` URI."""
    if source[:5].lower() == "data:":
        return _inline(source, shown)
    try:
        parts = urlsplit(source)
    except ValueError:
        raise Skip("no address", shown) from None
    if parts.scheme in ("http", "https", "ftp") or (not parts.scheme and parts.netloc):
        raise Skip("on the network", shown)
    path = unquote(parts.path)
    outside = parts.scheme or parts.netloc or path.startswith(("/", "\\")) or "\0" in path
    file = None if outside else _inside(page.parent / path.replace("\\", "/"), root)
    if file is None:
        raise Skip("outside the page's folder", shown)
    if not file.is_file():
        raise Skip("not found", shown)
    if file.stat().st_size > MAX_PICTURE_BYTES:
        raise Skip("too large", shown)
    try:
        return file.read_bytes()
    except OSError:
        raise Skip("not readable", shown) from None


def _inside(path: Path, root: Path) -> Path | None:
    """`path` with all links followed, if that is in `root`, else None."""
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        return None
    return real if real.is_relative_to(root) else None


def _inline(source: str, shown: str) -> bytes:
    head, comma, body = source[5:].partition(",")
    if not comma:
        raise Skip("no address", shown)
    content = unquote_to_bytes(body)
    if head.lower().replace(" ", "").endswith(";base64"):
        try:
            stripped = content.translate(None, b" \t\r\n\f")
            content = base64.b64decode(stripped + b"=" * (-len(stripped) % 4), validate=True)
        except binascii.Error:
            raise Skip("broken or no picture", shown) from None
    if len(content) > MAX_PICTURE_BYTES:
        raise Skip("too large", shown)
    return content


# ---------------------------------------------------------------------------------------------------------------- the data


def load_pairs(name: str, path: Path, split: str, size: int) -> Dataset:
    """The pairs of a page or folder as data. From 200 pictures on a tenth of the captions is held out, and the pictures that have
    them; of fewer, too few to spare any, the test is what was trained on, and a note says so.
    """
    found = read_pairs(path, size)
    if not found.pictures:
        raise ValueError(f"{name}: no pair of a picture and a caption: {found}")
    notes = [f"{name}: {found}"] if found.skipped else []
    kept = [(picture, captions) for picture, captions in zip(found.pictures, found.captions)]
    if len(kept) < ENOUGH:
        if split == "test":
            notes.append(f"{name}: with fewer than {ENOUGH} pictures none is held out; the test is what was trained on")
    elif split == "train":
        kept = [(picture, captions) for picture, captions in kept if not any(map(held_out, captions))]
    else:
        kept = [(picture, [caption for caption in captions if held_out(caption)]) for picture, captions in kept]
        kept = [(picture, captions) for picture, captions in kept if captions]
    if not kept:
        raise ValueError(f"{name}: none of the {len(found.pictures)} pictures is for {split}")
    pictures, captions = zip(*kept)
    return Dataset(np.stack(pictures), None, name, notes=tuple(notes), captions=Captions.of(captions))
