"""The whole chain at tiny size: captions → tokens → vectors → UNet over latents → decoder → picture, every link trained here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinydiff import cache, faithfulness, images, io, simarray, tasks, train
from tinydiff.cli import main
from tinydiff.data import sources
from tinydiff.data.captions import Captions
from tinydiff.data.dataset import Dataset
from tinydiff.prompts import TextPipeline
from tinydiff.run import Run

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PLACES = ("upper left", "upper right", "lower left", "lower right")
SIDE = 8


def lamps(count: int, split: str) -> Dataset:
    """Dark pictures (8, 8, 3) of which a quarter is lit in one of four colours: 16 meanings, each said of 1/16 of the pictures.

    What is said of them in training is never said in the test.
    """
    rng = np.random.default_rng([count, split == "test"])
    meaning = rng.permutation(np.arange(count) % 16)
    pictures = rng.integers(0, 40, (count, SIDE, SIDE, 3)).astype(np.uint8)
    for picture, number in zip(pictures, meaning):
        row, column = 4 * (number % 4 // 2), 4 * (number % 2)
        quarter = picture[row : row + 4, column : column + 4]
        quarter[:] = np.where(np.array(list(COLOURS.values())[number // 4]) > 0, 255 - quarter, quarter)
    if split == "train":
        said = ("a {colour} lamp in the {place}", "{colour}, {place}", "the {place} is {colour}")
    else:
        said = ("look, {colour} light: {place}",)
    texts = tuple(tuple(s.format(colour=c, place=p) for s in said) for c in COLOURS for p in PLACES)
    return Dataset(pictures, None, "lamps", captions=Captions(texts, meaning))


def read(pictures: np.ndarray) -> np.ndarray:
    """Which of the 16 meanings pictures (N, 8, 8, 3) have: the brightest quarter, and the colour nearest to its mean."""
    quarters = pictures.reshape(len(pictures), 2, 4, 2, 4, 3).mean((2, 4), dtype=np.float64).reshape(-1, 4, 3)
    place = quarters.max(2).argmax(1)
    shade = quarters[np.arange(len(place)), place]
    distance = ((shade[:, None] - np.array(list(COLOURS.values()))) ** 2).sum(2)
    return 4 * distance.argmin(1) + place


SOURCE = sources.Source(lambda asked: lamps(512 if asked.split == "train" else 64, asked.split), "lamps")


def prompts(n: int, split: str = "test") -> tuple[list[str], np.ndarray]:
    """n captions, the 16 meanings in turn, and these."""
    captions = lamps(16, split).captions
    assert captions is not None
    return [captions.phrasings[i % 16][0] for i in range(n)], np.arange(n) % 16


CLIP: dict[str, Any] = {
    "projection_dim": 16,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "vision_config": {"hidden_size": 32, "widths": [16, 16], "norm_num_groups": 4},
}
UNET: dict[str, Any] = {
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"steps": 150, "batch_size": 64, "lr": 3e-3, "ema": 0.95, "vocab_size": 600, "augment": False},
    "autoencoder": {"steps": 300, "batch_size": 32, "lr": 3e-3, "ema": 0.9, "factor": 2, "width": 16},
    "text-to-image": {"steps": 500, "batch_size": 32, "lr": 3e-3, "ema": 0.98},
}


def configure(task: str, **options: Any) -> dict[str, Any]:
    network = {"clip": CLIP, "text-to-image": UNET, "autoencoder": {"norm_num_groups": 4}}[task]
    own = {f"model.{name}": value for name, value in network.items()}
    return tasks.configure(task, options={"data": "lamps", "showings": 1} | CONFIGS[task] | own | options)


def train_chain(folder: Path) -> dict[str, Path]:
    """Encoders, an autoencoder, a UNet that listens to the ones and works among the other's latents; and a judge."""
    made = {name: folder / name for name in ("clip", "autoencoder", "words", "judge")}
    train.train(Run.create(made["clip"], configure("clip")))
    train.train(Run.create(made["judge"], configure("clip", seed=1)))
    train.train(Run.create(made["autoencoder"], configure("autoencoder")))
    parts = {"text": str(made["clip"]), "latents": str(made["autoencoder"])}
    train.train(Run.create(made["words"], configure("text-to-image", **parts)))
    return made


@pytest.fixture(scope="module", autouse=True)
def _lamps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data under its name, and a cache of this file's own for its latents."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "lamps", SOURCE)
        patch.setattr(cache, "folder", lambda: folder)
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_chain(tmp_path_factory.mktemp("chain"))


FAST = {"sampler": "dpmpp_2m", "steps": 8}


def share(pipeline: TextPipeline, texts: list[str], wanted: np.ndarray) -> float:
    """Of pictures drawn of the texts, how many show what is wanted."""
    return float(np.mean(read(pipeline.draw(texts, range(len(texts)), guidance=3.0, **FAST)) == wanted))


def judged(run: Path, judge: Path, n: int = 64, **settings: Any) -> dict[str, Any]:
    return faithfulness.evaluate_text_to_image(run, n, judge=judge, guidance=3.0, **FAST, **settings)


# ------------------------------------------------------------------------------------------------------ every link in its place


def test_lamps_are_read() -> None:
    for split in ("train", "test"):
        found = lamps(160, split)
        assert found.captions is not None
        np.testing.assert_array_equal(read(found.images), found.captions.meaning)


def test_the_chain_draws_what_words_it_never_met_say(chain: dict[str, Path]) -> None:
    """Colour and place, of a phrasing never heard in training; and of other words, other colours and places."""
    pipeline = TextPipeline.load(chain["words"])
    texts, wanted = prompts(64)
    assert share(pipeline, texts, wanted) >= 0.8
    assert share(pipeline, np.roll(texts, 1).tolist(), wanted) <= 0.1
    assert share(pipeline, [""] * 64, wanted) <= 0.3


def nothing(pipeline: TextPipeline, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one link of the chain deaf, or blind: what it gives no longer depends on what it gets."""
    if link == "tokeniser":
        row = pipeline.text.tokenizer("a red lamp")[0]
        monkeypatch.setattr(pipeline.text, "tokenizer", lambda texts: np.stack([row] * len(texts)))
    elif link == "text encoder":
        encode = pipeline.text.model.forward
        monkeypatch.setattr(pipeline.text.model, "forward", lambda ids: encode(np.zeros_like(ids)))
    elif link == "network":
        attentions = [module.attn2 for _, module in pipeline.model.named_modules() if hasattr(module, "attn2")]
        assert len(attentions) == 7
        for attention in attentions:
            attention.to_v.weight.assign_(np.zeros(attention.to_v.weight.shape, np.float32))
    elif link == "guidance":
        draw = pipeline.sample
        monkeypatch.setattr(pipeline, "sample", lambda told, null, *rest, **more: draw(0 * told + null, null, *rest, **more))
    else:
        decode: Callable[[np.ndarray], np.ndarray] = pipeline.space.decode
        monkeypatch.setattr(pipeline.space, "decode", lambda x: decode(np.zeros_like(x)))


@pytest.mark.parametrize("link", ["tokeniser", "text encoder", "network", "guidance", "decoder"])
def test_a_link_that_ignores_its_input_is_noticed(chain: dict[str, Path], link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share falls to that of guessing, 1/16 (or of a guess of the place alone), whichever link it is."""
    pipeline = TextPipeline.load(chain["words"])
    nothing(pipeline, link, monkeypatch)
    assert share(pipeline, *prompts(64)) <= 0.3


def test_training_with_captions_of_other_pictures_is_noticed(
    chain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UNet that was told what is said of other pictures draws these, and not what it is asked for."""
    from tinydiff.tasks.text_to_image import TextToImageTask

    heard = TextToImageTask.told
    monkeypatch.setattr(TextToImageTask, "told", lambda self, step, rng: np.roll(heard(self, step, rng), 1, axis=0))
    parts = {"text": str(chain["clip"]), "latents": str(chain["autoencoder"])}
    train.train(Run.create(tmp_path / "run", configure("text-to-image", **parts)))
    assert share(TextPipeline.load(tmp_path / "run"), *prompts(64)) <= 0.3


# ---------------------------------------------------------------------------------------------------------------- the judge


def test_a_judge_that_never_met_the_run_finds_the_captions(chain: dict[str, Path]) -> None:
    found = judged(chain["words"], chain["judge"])
    assert found["among"] == found["unseen_among"] == 16
    assert found["recall_1"] >= 0.8 and found["recall_10"] >= 0.95 and found["real_recall_10"] >= 0.95
    assert found["unseen_recall_1"] >= 0.7
    assert 0.4 <= found["chance"] <= 0.85  # ten of sixteen
    assert found["recall_1"] <= found["recall_5"] <= found["recall_10"]
    assert "judge" in found and "classifier" not in found


@pytest.mark.parametrize("place", ["prompts", "captions"])
def test_with_captions_swapped_the_score_falls(chain: dict[str, Path], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the run draws what others are asked for, or the judge is asked about others."""
    if place == "prompts":
        draw = TextPipeline.draw
        monkeypatch.setattr(
            TextPipeline, "draw", lambda self, texts, *rest, **more: draw(self, list(np.roll(texts, 1)), *rest, **more)
        )
    else:
        by_rank = faithfulness.judge_by_rank
        monkeypatch.setattr(
            faithfulness,
            "judge_by_rank",
            lambda seen, own, captions, matcher: by_rank(seen, own, list(np.roll(captions, 1)), matcher),
        )
    found = judged(chain["words"], chain["judge"])
    assert found["recall_1"] <= 0.2 and found["unseen_recall_1"] <= 0.2


def test_the_judge_looks_where_it_is_told_to(chain: dict[str, Path]) -> None:
    pipeline = TextPipeline.load(chain["words"])
    pictures, found = lamps(16, "train").images, []
    for device in ("cpu", "cudasim"):
        given, _ = faithfulness.exams(pipeline, "lamps", 16, "classifier", chain["judge"], device)
        with simarray.recorded_copies() as copies:
            found.append(given[""].mark(pictures[:8]))
        assert bool(copies) == (device == "cudasim")
    names = sorted(name for name in found[0] if "recall" in name)
    assert len(names) == 4
    np.testing.assert_allclose([found[1][name] for name in names], [found[0][name] for name in names], atol=0.13)  # one of eight


def test_the_judge_s_ranks() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1], [0.3, 0.2, 0.1]])

    class Eye:
        def scores(self, pictures: np.ndarray, captions: list[str]) -> np.ndarray:
            return scores

    found = faithfulness.judge_by_rank(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 2]), ["a", "b", "c"], Eye())  # type: ignore[arg-type]
    assert found["recall_1"].tolist() == [True, False, False]  # of equals, the other counts
    assert found["recall_5"].all() and found["recall_10"].all()


def test_prompts_of_the_exam_are_each_asked_for_equally_often(chain: dict[str, Path]) -> None:
    exam = faithfulness.exam_by_rank(SOURCE.load(sources.Request("lamps", "", "test", 0)), 40, _Everything())  # type: ignore[arg-type]
    assert len(set(exam.prompts)) == 16 and all(2 <= exam.prompts.count(text) <= 3 for text in exam.prompts)
    assert all(text.startswith("look, ") for text in exam.prompts)


class _Everything:
    """Finds all captions equally good."""

    def scores(self, pictures: np.ndarray, captions: list[str]) -> np.ndarray:
        return np.zeros((len(pictures), len(captions)))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("clip", "has the text encoder that the run itself listens to; train one with another --seed"),
        (None, "give --judge CLIP_RUN"),
        ("words", "holds a text-to-image, and a clip is needed here"),
    ],
)
def test_who_cannot_judge(chain: dict[str, Path], judge: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(chain["words"]), "--n", "4", *(["--judge", str(chain[judge])] if judge else [])]
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_a_judge_goes_with_words(chain: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "digits", "--judge", str(chain["judge"])]) == 2
    assert "--judge goes with a run of text-to-image" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the run over latents


def test_evaluation_and_pictures_of_a_run_that_was_moved(
    chain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, with the runs that it was made from gone."""
    moved = shutil.copytree(chain["words"], tmp_path / "moved")
    config = io.read_json(moved / "config.json")
    io.write_json(moved / "config.json", config | {"text": "/gone", "latents": "/gone"})
    drawing = ["--sampler", "dpmpp_2m", "--steps", "8", "--cfg", "3"]
    assert main(["eval", str(moved), "--n", "32", "--judge", str(chain["judge"]), *drawing, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recall_1"] >= 0.7 and found["n"] == 32 and found["guidance"] == 3.0
    assert main(["eval", str(moved), "--n", "32", "--judge", str(chain["judge"]), *drawing]) == 0
    assert "real_recall_10" in capsys.readouterr().out
    out, npz = tmp_path / "grid.png", tmp_path / "grid.npz"
    command = ["sample", str(moved), "--prompt", "a red lamp in the lower left", "--n", "6", *drawing]
    assert main([*command, "--out", str(out), "--npz", str(npz), "--attention", str(tmp_path / "maps.png")]) == 0
    with np.load(npz) as drawn:
        assert np.mean(read(drawn["images"]) == 2) >= 0.8
    assert (tmp_path / "maps.png").is_file()


def test_a_resumed_run_ends_in_the_same_bits(chain: dict[str, Path], tmp_path: Path) -> None:
    """Though the runs of the text encoder and of the autoencoder are gone by then."""
    copies = {name: str(shutil.copytree(chain[name], tmp_path / name)) for name in ("clip", "autoencoder")}
    config = configure("text-to-image", text=copies["clip"], latents=copies["autoencoder"], steps=6)
    whole = train.train(Run.create(tmp_path / "whole", config))
    run = Run.create(tmp_path / "parts", config)
    task = tasks.make_task(run.config)
    half = train.Trainer(task, 6)
    task.store(run.model)
    for _ in range(3):
        half.advance()
    half.save(run)
    for copy in copies.values():
        shutil.rmtree(copy)
    resumed = train.train(Run.open(tmp_path / "parts"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        np.testing.assert_array_equal(a.data, b.data, err_msg=name)


def test_what_a_step_sees(chain: dict[str, Path]) -> None:
    """Latents of the pictures, and captions of the very same."""
    parts = {"text": str(chain["clip"]), "latents": str(chain["autoencoder"])}
    task: Any = tasks.make_task(configure("text-to-image", caption_drop=0.0, **parts))
    index = task.indices(2)
    np.testing.assert_array_equal(read(task.space.decode(task.clean(2))), task.captions.meaning[index])
    said = task.captions.draw(index, 0, 2)
    np.testing.assert_allclose(task.told(2, np.random.default_rng(0)), task.text(said), atol=1e-6)
    assert task.space.size == (4, 4, 4) and task.model_config()["in_channels"] == 4


def test_pictures_begun_with_and_painted_into(chain: dict[str, Path], tmp_path: Path) -> None:
    """A red lamp turns blue where the mask says, and a film leads from one prompt to the next."""
    pipeline = TextPipeline.load(chain["words"])
    found = lamps(160, "train")
    assert found.captions is not None
    red = found.images[found.captions.meaning == 0][0]
    images.save_png(tmp_path / "red.png", red)
    mask = np.zeros((SIDE, SIDE, 1), np.uint8)
    mask[:4, :4] = 255
    images.save_png(tmp_path / "mask.png", mask)
    drawing = ["--sampler", "dpmpp_2m", "--steps", "8", "--cfg", "3", "--seeds", "5"]
    begin = ["sample", str(chain["words"]), "--init", str(tmp_path / "red.png"), "--npz", str(tmp_path / "drawn.npz"), *drawing]
    assert main([*begin, "--prompt", "a blue lamp in the upper left", "--mask", str(tmp_path / "mask.png"), "--n", "4"]) == 0
    with np.load(tmp_path / "drawn.npz") as drawn:
        pictures = drawn["images"]
    assert np.mean(read(pictures) == 8) >= 0.75
    back = pipeline.space.decode(pipeline.space.encode(red[None]))[0].astype(int)
    assert np.abs(pictures[:, 6:, 6:].astype(int) - back[6:, 6:]).mean() < 12  # two latents away from the mask
    assert main([*begin, "--prompt", "a blue lamp in the upper left", "--strength", "0", "--n", "1"]) == 0
    with np.load(tmp_path / "drawn.npz") as drawn:
        np.testing.assert_array_equal(drawn["images"][0], back)
    film = pipeline.walk(["a red lamp in the lower left", "a green lamp in the upper right"], 3, 1, guidance=3.0, **FAST)
    assert film.shape == (4, SIDE, SIDE, 3) and read(film[[0, -1]]).tolist() == [2, 5]
