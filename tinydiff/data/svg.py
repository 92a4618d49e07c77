"""SVG pictures of strangers to pixels, by resvg, which comes with the extra `pictures`.

An SVG is a program of a kind: it can name files, and a few hundred bytes can ask for more work than there are years. So one that
refers to anything outside itself is refused, and the rest are drawn in a process of their own, with a limit on time and memory.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from xml.parsers import expat

import numpy as np

from tinydiff.images import WHITE, read_image

MAX_BYTES = 4 * 2**20
MAX_SECONDS = 10
MAX_MEMORY = 2**30
_PROGRAM = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MAX_MEMORY}, {MAX_MEMORY}))
except (ImportError, ValueError, OSError):
    pass  # no such limits here; the one on time is the parent's
import resvg_py
size = int(sys.argv[1])
text = sys.stdin.buffer.read().decode()
sys.stdout.buffer.write(resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True))
"""


def is_svg(content: bytes) -> bool:
    """Whether a file's content looks like SVG."""
    return b"<svg" in content[:4096] and content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def read_svg(content: bytes, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the whole drawing in the middle, on white.

    Raises ImportError without the extra, and ValueError for what is broken, too much work, or refers to other files.
    """
    if find_spec("resvg_py") is None:
        raise ImportError('SVG pictures need the package resvg_py, which is not installed: pip install "tinydiff[pictures]"')
    if len(content) > MAX_BYTES:
        raise ValueError(f"an SVG of {len(content):,} bytes; at most {MAX_BYTES:,} are read")
    _check_references(content)
    # -P keeps a module that lies in the current folder, the page's perhaps, from being imported instead
    command = [sys.executable, "-P", "-c", _PROGRAM, str(size)]
    try:
        drawn = subprocess.run(command, input=content, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"an SVG that takes more than {MAX_SECONDS} seconds to draw") from None
    if drawn.returncode:
        lines = drawn.stderr.decode(errors="replace").split("\n")
        raise ValueError(
            f"an SVG that can't be drawn: {next((line for line in reversed(lines) if line.strip()), 'too much memory')}"
        )
    picture = read_image(drawn.stdout, background=WHITE)
    height, width = picture.shape[:2]
    whole = np.full((size, size, 3), WHITE, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    whole[top : top + height, left : left + width] = picture
    return whole


def _check_references(content: bytes) -> None:
    """Raise ValueError if the SVG is no XML in UTF-8, or refers to anything but parts of itself and pictures inside it."""
    parser = expat.ParserCreate("utf-8")

    def look(element: str, attributes: dict[str, str]) -> None:
        if element.rpartition(":")[2] == "a":
            return  # a link, which drawing doesn't follow
        for name, value in attributes.items():
            reference = value.strip()
            if name.rpartition(":")[2].lower() == "href" and reference and not reference.startswith(("#", "data:")):
                raise ValueError(f"an SVG that refers to another file, {reference[:80]!r}")

    parser.StartElementHandler = look
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"an SVG that is no well-formed XML: {error}") from None
