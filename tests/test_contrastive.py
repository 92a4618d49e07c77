"""Contrastive training: the loss against its definition, the whole of a small training, and the commands that use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tinydiff as td
from tinydiff import __version__, data, figures, simarray
from tinydiff.cli import cli, main
from tinydiff.contrastive import Matcher, background, contrastive_loss, guessing, recalls, retrieval, same_pairs, zero_shot
from tinydiff.data.captions import Captions
from tinydiff.data.shapes import COLOURS, SHAPES, SIZES, misleading, parse
from tinydiff.dream import PixelGradients
from tinydiff.images import read_png_metadata, save_png
from tinydiff.models import CLIP
from tinydiff.pipeline import load_model
from tinydiff.run import Run
from tinydiff.tasks import configure, make_task
from tinydiff.tokenizer import Tokenizer
from tinydiff.train import Trainer, train

TINY: dict[str, Any] = {
    "projection_dim": 8,
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
    },
    "vision_config": {"hidden_size": 16, "widths": [8, 8], "norm_num_groups": 4},
}
FAST: dict[str, Any] = {
    "steps": 6,
    "batch_size": 16,
    "showings": 1,
    "vocab_size": 600,
    **{f"model.{name}": value for name, value in TINY.items()},
}


def vectors(rng: np.random.Generator, n: int, size: int = 5) -> np.ndarray:
    x = rng.standard_normal((n, size))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_definition(images: np.ndarray, texts: np.ndarray, scale: float, same: np.ndarray) -> float:
    """Pair by pair."""
    factor, n, total = min(np.exp(scale), 100.0), len(images), 0.0
    for i in range(n):
        own = factor * images[i] @ texts[i]
        wrong = [j for j in range(len(texts)) if j != i and not same[i, j]]
        total += np.log(np.exp(own) + sum(np.exp(factor * images[i] @ texts[j]) for j in wrong)) - own
        wrong = [j for j in range(n) if j != i and not same[j, i]]
        total += np.log(np.exp(own) + sum(np.exp(factor * images[j] @ texts[i]) for j in wrong)) - own
    return total / (2 * n)


@given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 2**32 - 1), st.floats(-1, 5.5))
def test_loss_by_its_definition(n: int, more: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    images, texts, same = vectors(rng, n), vectors(rng, n + more), rng.random((n, n + more)) < 0.3
    found = contrastive_loss(*map(td.tensor, (images, texts)), td.tensor(scale, dtype="float64"), same)
    assert found.item() == pytest.approx(by_definition(images, texts, scale, same), rel=1e-6, abs=1e-9)


@given(st.permutations(range(6)), st.integers(0, 1000))
def test_the_order_of_a_batch_does_not_matter(order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = vectors(rng, 6), vectors(rng, 6)
    captions = [f"caption {k}" for k in rng.integers(0, 5, 6)]
    said = [(caption, f"caption {k}") for caption, k in zip(captions, rng.integers(0, 5, 6))]

    def loss(index: list[int]) -> float:
        same = same_pairs([said[i] for i in index], [captions[i] for i in index])
        return contrastive_loss(td.tensor(images[index]), td.tensor(texts[index]), td.tensor(1.0, dtype="float64"), same).item()

    assert loss(order) == pytest.approx(loss(list(range(6))), rel=1e-9)


def test_gradient_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    same = np.eye(4, dtype=bool)
    same[0, 2] = same[2, 0] = True
    inputs = [td.tensor(x, requires_grad=True) for x in (vectors(rng, 4), vectors(rng, 4), np.array(1.3))]
    td.gradcheck(lambda a, b, c: contrastive_loss(a, b, c, same), inputs)
    td.gradgradcheck(lambda a, b, c: contrastive_loss(a, b, c, same), inputs)


def test_equal_captions_are_no_wrong_pairs() -> None:
    said = [("a dog", "a hound"), ("a cat",), ("a dog",), ("a dog", "a hound")]
    same = same_pairs(said, ["a dog", "a cat", "a dog", "a hound", "a bird"])
    assert same.tolist() == [[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]
    # With nothing but one caption there is nothing to tell apart; without this knowledge the loss could not fall below ln 3.
    one = td.tensor(np.eye(5)[[0, 0, 0]])
    scale = td.tensor(2.0, dtype="float64")
    assert contrastive_loss(one, one, scale, np.ones((3, 3), bool)).item() == pytest.approx(0, abs=1e-12)
    assert contrastive_loss(one, one, scale).item() == pytest.approx(np.log(3))


def test_guessing() -> None:
    """What vectors that say nothing lose: all alike."""
    same = np.eye(6, dtype=bool)
    same[:2, :2] = True
    alike = td.tensor(np.tile(vectors(np.random.default_rng(0), 1), (6, 1)))
    loss = contrastive_loss(alike, alike, td.tensor(1.0, dtype="float64"), same)
    assert guessing(same) == pytest.approx(loss.item())
    assert guessing(np.eye(8, dtype=bool)) == pytest.approx(np.log(8))
    assert guessing(np.eye(8, 32, dtype=bool)) == pytest.approx((np.log(8) + np.log(32)) / 2)


def test_recalls() -> None:
    scores = np.eye(20)
    assert recalls(scores) == {"recall_1": 1.0, "recall_5": 1.0, "recall_10": 1.0}
    scores[0, 1:4] = 2.0  # three better ones
    scores[1, :12] = 5.0  # eleven as good
    assert recalls(scores) == {"recall_1": 0.9, "recall_5": 0.95, "recall_10": 0.95}


# ------------------------------------------------------------------------------------------------------------ whole trainings


def page(folder: Path, count: int = 6) -> str:
    """A page of plain coloured pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {
        "red": (255, 0, 0),
        "green": (0, 160, 0),
        "blue": (0, 0, 255),
        "black": (0, 0, 0),
        "grey": (128,) * 3,
        "pink": (255, 150, 200),
    }
    lines = []
    for name, colour in list(colours.items())[:count]:
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
        lines.append(f'<img src="{name}.png" alt="a {name} wall">')
    (folder / "index.html").write_text("\n".join(lines))
    return f"pairs:{folder / 'index.html'}"


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that has learnt six captions, and the folder of their pictures."""
    folder = tmp_path_factory.mktemp("walls")
    spec = page(folder / "page")
    options = FAST | {"data": spec, "size": 16, "steps": 60, "lr": 1e-2, "ema": 0.9, "batch_size": 12, "augment": False}
    train(Run.create(folder / "run", configure("clip", options=options)))
    return folder / "run", folder / "page"


def test_learns(walls: tuple[Path, Path]) -> None:
    run, folder = walls
    assert Run.open(run).stats[-1]["plain_recall_1"] == 1.0
    assert Run.open(run).stats[-1]["guessing"] == 0.0
    matcher = Matcher.load(run)
    names = ["red", "green", "blue", "black", "grey", "pink"]
    pictures = np.stack([matcher.read(folder / f"{name}.png") for name in names])
    scores = matcher.scores(pictures, [f"a {name} wall" for name in names])
    assert (scores.argmax(1) == np.arange(6)).all() and (scores.argmax(0) == np.arange(6)).all()
    assert np.abs(scores).max() <= 1 + 1e-6
    np.testing.assert_allclose(matcher.images(pictures[:2]), matcher.images(pictures)[:2], atol=1e-5)
    # Each side is listened to: with the captions passed on by one place, the answers are too.
    turned = matcher.scores(pictures, [f"a {name} wall" for name in names[1:] + names[:1]])
    assert (turned.argmax(1) == (np.arange(6) - 1) % 6).all()


def test_score(walls: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = walls
    arguments = ["score", str(run), str(folder / "red.png"), str(folder / "blue.png")]
    arguments += ["--captions", "a blue wall", "a red wall", "--out", str(tmp_path / "table.png")]
    done = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    result = json.loads(done.output)
    assert [row["best"] for row in result["pictures"]] == ["a red wall", "a blue wall"]
    matcher = Matcher.load(run)
    pictures = np.stack([matcher.read(folder / f"{name}.png") for name in ("red", "blue")])
    expected = matcher.scores(pictures, ["a blue wall", "a red wall"])
    np.testing.assert_allclose([row["scores"] for row in result["pictures"]], expected, atol=1e-5)
    with Image.open(tmp_path / "table.png") as figure:
        assert figure.width > 300 and figure.height > 200
    plain = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    assert "red.png" in plain and "a blue wall" in plain and f"{expected[0, 1]:.3f} *" in plain
    said = read_png_metadata(tmp_path / "table.png")
    assert said["run"] == str(run) and said["weights"] == matcher.hash and __version__ in said["software"]
    assert json.loads(said["captions"]) == ["a blue wall", "a red wall"]
    assert json.loads(said["pictures"]) == [str(folder / "red.png"), str(folder / "blue.png")]


def test_score_draws_unless_it_cannot(walls: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = walls
    monkeypatch.chdir(tmp_path)
    command = ["score", str(run), str(folder / "red.png"), "--captions", "a blue wall"]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).output.splitlines()[-1] == "score.png"
    assert read_png_metadata("score.png")["run"] == str(run)
    many = CliRunner().invoke(cli, [*command, *map(str, range(60)), "--json"], catch_exceptions=False)
    assert "at most 40" in many.stderr and json.loads(many.stdout)["files"] == []
    written = Path("score.png").read_bytes()
    for wrong in (["--captions", *map(str, range(60)), "--out", "a.png"], ["--out", "no/such.png"]):
        assert CliRunner().invoke(cli, [*command, *wrong]).exit_code == 2
    mine = CliRunner().invoke(cli, ["score", str(run), "score.png", "--captions", "a"])  # what it reads, it does not overwrite
    assert mine.exit_code == 2 and "score.png is what is read" in mine.stderr and Path("score.png").read_bytes() == written


def test_search(walls: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = walls
    (folder / "broken.png").write_bytes(b"no picture")
    done = CliRunner().invoke(
        cli, ["search", str(run), "a green wall", str(folder), "--n", "3", "--json"], catch_exceptions=False
    )
    (folder / "broken.png").unlink()
    result = json.loads(done.stdout)
    assert result["searched"] == 6 and len(result["found"]) == 3 and "broken.png" in done.stderr
    assert result["found"][0]["picture"].endswith("green.png")
    scores = [row["score"] for row in result["found"]]
    assert scores == sorted(scores, reverse=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong, message in [(empty, "no picture in"), (tmp_path / "none", "no such folder")]:
        error = CliRunner().invoke(cli, ["search", str(run), "a", str(wrong)]).exception
        assert message in str(error)


def test_search_goes_through_a_folder_in_batches(
    walls: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many pictures at once as told, whatever can't be read, and the answers of all at once."""
    run, folder = walls
    shutil.copytree(folder, tmp_path / "walls")
    for name in ("black.png", "e.png", "f.png"):  # the first two batches of two have one, and none
        (tmp_path / "walls" / name).write_bytes(b"no picture")
    command = ["search", str(run), "a green wall", str(tmp_path / "walls"), "--json"]
    whole = json.loads(CliRunner().invoke(cli, command, catch_exceptions=False).stdout)
    assert whole["searched"] == 5
    sizes: list[int] = []
    seen: list[tuple[int, int]] = []

    @contextmanager
    def bar(what: str) -> Iterator[Any]:
        yield lambda done, total, note: seen.append((done, total))

    images = Matcher.images
    monkeypatch.setattr(Matcher, "images", lambda self, x: sizes.append(len(x)) or images(self, x))
    monkeypatch.setattr("tinydiff.contrastive.BATCH", 2)
    monkeypatch.setattr("tinydiff.cli.score.progress", bar)
    parts = json.loads(CliRunner().invoke(cli, command, catch_exceptions=False).stdout)
    assert sizes == [1, 2, 2] and seen == [(done, 8) for done in range(1, 9)]
    assert [row["picture"] for row in parts["found"]] == [row["picture"] for row in whole["found"]]
    np.testing.assert_allclose([row["score"] for row in parts["found"]], [row["score"] for row in whole["found"]], atol=1e-5)


def test_commands_take_a_device(walls: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = walls
    red, blue = str(folder / "red.png"), str(folder / "blue.png")
    for command, answer in (
        (["score", str(run), red, blue, "--out", str(tmp_path / "a.png"), "--captions", "a red wall", "a wall"], "scores"),
        (["search", str(run), "a green wall", str(folder)], "score"),
        (["eval", str(run)], "plain_recall_1"),
    ):
        rows = []
        for device in ("cpu", "cudasim"):
            with simarray.recorded_copies() as copies:
                done = CliRunner().invoke(cli, [*command, "--device", device, "--json"], catch_exceptions=False)
            assert bool(copies) == (device == "cudasim")
            found = json.loads(done.stdout)
            rows.append(found.get("pictures") or found.get("found") or [found])
        assert rows[0] and [row.get("picture") for row in rows[0]] == [row.get("picture") for row in rows[1]]
        np.testing.assert_allclose([row[answer] for row in rows[1]], [row[answer] for row in rows[0]], atol=1e-4)


def test_what_was_dropped_is_said_once_and_in_one_line(
    walls: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = walls
    long = "a red wall " * 12 + "behind a dragon"
    for command in (
        ["score", str(run), str(folder / "red.png"), "--out", str(tmp_path / "a.png"), "--captions", long, long],
        ["search", str(run), long, str(folder)],
    ):
        assert main(command) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tinydiff: warning: {long!r} has ") and "dragon" in line.partition("dropped: ")[2]


def test_captions_cut_in_training_are_told_of_before_it(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    options = FAST | {"data": page(tmp_path), "size": 16, "batch_size": 4}
    assert make_task(configure("clip", options=options)).notes == ()
    options["model.text_config"] = TINY["text_config"] | {"max_position_embeddings": 5}
    task = make_task(configure("clip", options=options))
    (note,) = task.notes  # no colour comes twice, so none is one token
    assert note.startswith("6 of 6 captions have more than the text encoder's 3 tokens, such as 'a red wall'")
    task.show(task.build(), 1, tmp_path)
    task.loss(task.build(), 0)
    assert not recwarn.list


def test_eval(walls: tuple[Path, Path]) -> None:
    run, _ = walls
    result = json.loads(CliRunner().invoke(cli, ["eval", str(run), "--json"], catch_exceptions=False).output)
    assert result["task"] == "clip" and result["among"] == 6 and result["plain_recall_1"] == 1.0
    other = CliRunner().invoke(cli, ["eval", str(run), "--data", "digits"]).exception
    assert "takes pictures" in str(other)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digits holds a denoiser, and a clip is needed here"):
        Matcher.load("digits")


def test_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, parts = (Run.create(tmp_path / name, configure("clip", options=FAST)) for name in ("whole", "parts"))
    expected = train(whole)
    begun = Trainer(make_task(parts.config), 6)
    begun.task.store(parts.model)
    for _ in range(3):
        begun.advance()
    begun.save(parts)
    found = train(parts)
    for a, b in zip(found.model.parameters(), expected.model.parameters()):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert load_model(parts.path)[1] == load_model(whole.path)[1]
    tokenizer = Tokenizer.load(whole.model / "tokenizer", 24)
    assert len(tokenizer) == load_model(whole.path)[1]["model"]["text_config"]["vocab_size"]


def test_what_a_step_sees() -> None:
    task: Any = make_task(configure("clip", options=FAST | {"made_up": 1.0}))
    x, rows, same = task.pairs(3)
    again = task.pairs(3)
    assert x.shape == (16, 28, 28, 1) and rows.shape == (16, 24) and same.shape == (16, 16)
    for a, b in zip((x, rows, same), again):
        np.testing.assert_array_equal(a, b)
    labels = task.data.labels[task.indices(3)]
    np.testing.assert_array_equal(same, labels[:, None] == labels)
    plain: Any = make_task(configure("clip", options=FAST | {"made_up": 0.0}))
    captions = task.captions.draw(task.indices(3), 0, 3)
    np.testing.assert_array_equal(plain.pairs(3)[1], task.tokenizer(captions))
    # The caption is still there, in order, among words that mean nothing.
    words = {word for caption in task.captions.every() for word in caption.split()}
    longer = 0
    for row, caption in zip(rows, captions):
        said = task.tokenizer.decode(row).split()
        longer += len(said) > len(caption.split())
        assert [word for word in said if word in words] == caption.split()
    assert longer >= 12


def test_false_captions_of_shapes() -> None:
    options = FAST | {"data": "shapes:300", "made_up": 0.0, "misleading": 3, "model.text_config": TINY["text_config"]}
    task: Any = make_task(configure("clip", options=options))
    rows, same = task.pairs(2)[1:]
    said = [task.captions[i] for i in task.indices(2)]
    captions = [task.tokenizer.decode(row) for row in rows]
    assert 40 < len(captions) <= 64 and same.shape == (16, len(captions))
    for i in range(16):
        assert captions[i] in said[i]
        assert [caption in said[i] for caption in captions] == same[i].tolist()
    wordings = [" ".join("_" if w in (*COLOURS, *SHAPES, *SIZES) else w for w in caption.split()) for caption in captions]
    for caption, wording in zip(captions[16:], wordings[16:]):
        assert not parse(caption).held_out
        assert wording.replace("an _", "a _") in [other.replace("an _", "a _") for other in wordings[:16]]
    false = misleading(said[0], said[0][0], np.random.default_rng(0), 40)
    assert len(false) > 30 and not set(false) & set(said[0])


def test_a_loss_that_stays_is_reported(tmp_path: Path) -> None:
    arguments = ["train", "clip", "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "16", "--lr", "1e-6"]
    for name, value in FAST.items():
        if name not in ("steps", "batch_size"):
            arguments += ["--set", f"{name}={json.dumps(value)}"]
    # Vectors of one number say next to nothing: every cosine is 1 or -1, times a small factor.
    arguments += ["--set", "model.projection_dim=1", "--set", "model.logit_scale_init_value=-5"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "warning: the loss is that of guessing among a batch" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "fashion:tests"}, "train-images"),
        ({"made_up": 1.5}, "made_up = 1.5: it is a share"),
        ({"vocab_size": 100}, "take 514"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_task(configure("clip", options=FAST | options))


def test_data_without_captions(tmp_path: Path) -> None:
    for i in range(12):
        save_png(tmp_path / f"{i}.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"has no captions; use digits, shapes, page"):
        make_task(configure("clip", options=FAST | {"data": f"folder:{tmp_path}", "size": 16}))


# -------------------------------------------------------------------------------------------------------------------- figures


def test_names_and_captions_are_no_mathematics(tmp_path: Path) -> None:
    """What matplotlib would read as a formula, and fail at, is drawn as it is; and told in the metadata."""
    odd, path, picture = r"$\bad$ and $$", tmp_path / "a.png", np.zeros((4, 4, 1), np.uint8)
    maps, settings = np.ones((4, 4, 1)), {"captions": [odd, "☃"], "run": odd}
    gradients = PixelGradients(maps, maps, 0.1, 0.1, 16)
    for draw in (
        lambda: figures.score_map(np.eye(2), np.stack([picture] * 2), [odd, "b"], path, ["a", "b"], settings),
        lambda: figures.score_map(np.eye(2), np.stack([picture] * 2), ["a", "b"], path, [odd, "b"], settings),
        lambda: figures.attention_figure([(picture, [odd], maps)], path, settings),
        lambda: figures.probability_curve([0.1, 0.9], odd, path, settings),
        lambda: figures.pixel_gradient_figure(gradients, maps, odd, path, settings),
    ):
        draw()
        said = read_png_metadata(path)
        assert said["run"] == odd and json.loads(said["captions"]) == settings["captions"]
        path.unlink()


class Oracle(Matcher):
    """Knows the class of a picture by its first pixel, and of a caption by its last word."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def images(self, pictures: np.ndarray) -> np.ndarray:
        return np.eye(4)[pictures[:, 0, 0, 0]]

    def texts(self, captions: Any) -> np.ndarray:
        self.heard += captions
        return np.eye(4)[[int(caption.split()[-1]) for caption in captions]]


def test_zero_shot() -> None:
    labels = np.array([0, 1, 2, 3, 3])
    pictures = labels.astype(np.uint8)[:, None, None, None]
    told = [[f"a {i}", f"the {i if i < 2 else 3}"] for i in range(4)]  # the second phrasing takes 2 for 3
    found = zero_shot(Oracle(), pictures, labels, told)
    # By the second phrasing nothing is like a two, and a three is as much like a "two", which comes first.
    assert found == {"accuracy": 1.0, "accuracy_one_phrasing": pytest.approx(0.7), "accuracy_worst_phrasing": 0.4}


def test_retrieval_takes_each_meaning_once() -> None:
    meaning = np.array([0, 0, 1, 2, 2, 3])
    pictures = meaning.astype(np.uint8)[:, None, None, None]
    captions = Captions(tuple((f"a {i}", f"the {i}") for i in range(4)), meaning)
    oracle = Oracle()
    found = retrieval(oracle, data.Dataset(pictures, None, "made", captions=captions), 10)
    assert found["among"] == 4 and found["recall_1"] == 1.0
    assert sorted(int(caption[-1]) for caption in oracle.heard) == [0, 1, 2, 3]


def test_background() -> None:
    pictures = np.full((3, 8, 8, 3), 255, np.uint8)
    pictures[:, 2:6, 2:6] = 0
    assert background(pictures) == 1.0
    assert background(data.load("digits", "test").images) == -1.0


def test_shapes_find_their_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is that of an oracle, which knows the scenes: 1; and, shown the pictures in another order, next to 0."""
    from tinydiff import contrastive

    test = data.load("shapes:300", "test")
    all_captions: list[str] = []

    class Knowing(Oracle):
        shift = 0

        def images(self, pictures: np.ndarray) -> np.ndarray:
            said = [test.captions[(i + self.shift) % len(pictures)][0] for i in range(len(pictures))]  # type: ignore[index]
            return np.stack([self.vector(caption) for caption in said])

        def texts(self, captions: Any) -> np.ndarray:
            return np.stack([self.vector(caption) for caption in captions])

        def vector(self, caption: str) -> np.ndarray:
            if caption not in all_captions:
                all_captions.append(caption)
            return np.random.default_rng(all_captions.index(caption)).standard_normal(64)

    knowing = Knowing()
    assert contrastive.retrieval_of_shapes(knowing, test, 30) == 1.0
    knowing.shift = 1
    assert contrastive.retrieval_of_shapes(knowing, test, 30) < 0.2


def test_published_layout() -> None:
    """The whole of a small CLIP is stored under the published names."""
    task: Any = make_task(configure("clip", preset="vit"))
    names = dict(task.build().named_parameters())
    assert isinstance(task.build(), CLIP)
    assert "vision_model.pre_layrnorm.weight" in names and "text_model.final_layer_norm.weight" in names


def test_false_captions_are_wrong_in_every_kind_of_word_as_often() -> None:
    """Sizes and relations have one other word, colours five: yet each of the seven is what is wrong in a seventh."""
    rng = np.random.default_rng(3)
    true = "a small red circle above a large blue square"
    scene = parse(true)
    wrong: list[int] = []
    for false in misleading(scene.captions(), true, rng, 4000)[1::2]:
        other = parse(false)
        words = [[t.colour, t.shape, t.size] for t in (*scene.things, *other.things)]
        first, second = words[0] + words[1] + [scene.relation], words[2] + words[3] + [other.relation]
        wrong += [i for i, (a, b) in enumerate(zip(first, second)) if a != b]
    assert len(wrong) > 1500
    np.testing.assert_allclose(np.bincount(wrong, minlength=7) / len(wrong), 1 / 7, atol=0.05)


def test_shapes_have_a_recipe_of_their_own() -> None:
    from tinydiff import tasks

    assert tasks.configure("clip", options={"data": "shapes:50"})["misleading"] == 11
    assert tasks.configure("clip", options={"data": "shapes", "batch_size": 8})["batch_size"] == 8
    assert tasks.configure("clip", "vit", {"data": "digits"})["augment"]
