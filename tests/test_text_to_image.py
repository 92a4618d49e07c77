"""Pictures from words: the text encoder kept with a run, prompts and guidance, and training."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tinydiff as td
from tests.test_train import check_checkpointing
from tinydiff import data, faithfulness, figures, images, io, tasks, train
from tinydiff.cli import main
from tinydiff.data import shapes, sources
from tinydiff.data.captions import Captions
from tinydiff.data.dataset import Dataset
from tinydiff.models.clip import CLIPTextModel
from tinydiff.prompts import TextEncoder, TextPipeline
from tinydiff.run import Run
from tinydiff.tokenizer import Tokenizer

PLACES = ("upper left", "upper right", "lower left", "lower right")
LENGTH = 10
UNET: dict[str, Any] = {
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}


def lights(count: int, split: str) -> Dataset:
    """Dark pictures (8, 8) of which a quarter is lit; what is said of them in training is never said in the test."""
    rng = np.random.default_rng([count, split == "test"])
    place = rng.integers(0, 4, count)
    pictures = rng.integers(0, 30, (count, 8, 8, 1)).astype(np.uint8)
    for picture, where in zip(pictures, place):
        row, column = 4 * (where // 2), 4 * (where % 2)
        picture[row : row + 4, column : column + 4] += np.uint8(200)
    said = ("light in the {}", "the {} is lit") if split == "train" else ("a light: {}",)
    captions = Captions(tuple(tuple(text.format(name) for text in said) for name in PLACES), place)
    return Dataset(pictures, place, "lights", PLACES, captions=captions)


def lit(pictures: np.ndarray) -> np.ndarray:
    """Which quarter is the brightest: (N,)."""
    quarters = pictures.reshape(len(pictures), 2, 4, 2, 4).mean((2, 4), dtype=np.float64)
    return quarters.reshape(-1, 4).argmax(1)


@pytest.fixture(scope="module", autouse=True)
def _lights() -> Iterator[None]:
    before = dict(sources.SOURCES)
    sources.SOURCES["lights"] = sources.Source(lambda asked: lights(256, asked.split), "lights")
    yield
    sources.SOURCES.clear()
    sources.SOURCES.update(before)


def text_encoder(seed: int = 0, width: int = 16) -> TextEncoder:
    """Not trained, but with embeddings as large as if it were: what it says of different texts differs."""
    td.manual_seed(seed)
    captions = lights(4, "train").captions
    assert captions is not None
    tokenizer = Tokenizer.train(captions.every(), 540, LENGTH)
    model = CLIPTextModel(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=tokenizer.eos,
    )
    embeddings = model.text_model.embeddings
    for table in (embeddings.token_embedding, embeddings.position_embedding):
        with td.no_grad():
            table.weight.assign_(50 * table.weight.data)
    return TextEncoder(model, tokenizer)


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `of_run` needs of a run of `train clip`."""
    path = tmp_path_factory.mktemp("clip")
    text_encoder().save(path / "model")
    io.write_json(path / "model" / "config.json", {})
    io.save_weights(path / "model" / "model.safetensors", {"nothing": np.zeros(1, np.float32)})
    return path


def configure(clip_run: Path | str, **options: Any) -> dict[str, Any]:
    given = {"data": "lights", "text": str(clip_run), "steps": 4, "batch_size": 16, "showings": 1, **options}
    return tasks.configure("text-to-image", "small", given) | {"model": UNET}


@pytest.fixture(scope="module")
def trained(clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned where light is to be."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train.train(Run.create(path, configure(clip_run, steps=400, batch_size=32, lr=4e-3, ema=0.98)))
    return path


# --------------------------------------------------------------------------------------------------------- the text encoder


def test_a_text_encoder_comes_back_as_it_was(tmp_path: Path) -> None:
    encoder = text_encoder()
    encoder.save(tmp_path)
    again = TextEncoder.load(tmp_path)
    prompts = ["light in the upper left", "", "☃"]
    np.testing.assert_array_equal(again(prompts), encoder(prompts))
    assert again(prompts).shape == (3, LENGTH, 16) and again(prompts).dtype == np.float32
    assert again.hash == encoder.hash != text_encoder(1).hash
    assert again([]).shape == (0, LENGTH, 16)


def test_words_of_a_prompt() -> None:
    words = text_encoder().words("the upper  LEFT")
    assert len(words) == LENGTH and words[0] == "(begin)" and words[-1] == "(end)"
    assert "".join(words[1 : words.index("(end)")]) == "theupperleft"


def test_too_long_a_prompt_is_cut_with_a_warning() -> None:
    encoder = text_encoder()
    with pytest.warns(UserWarning, match="dropped: .*lit"):
        cut = encoder(["upper left, upper left, upper left, upper left, lit"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["the upper left"])
    with pytest.warns(UserWarning):
        np.testing.assert_array_equal(cut, encoder(["upper left, upper left, upper left, upper left, dark"]))


def test_tokeniser_and_encoder_must_fit() -> None:
    encoder = text_encoder()
    other = Tokenizer.train(["some words"], 520, LENGTH)
    with pytest.raises(ValueError, match="the text encoder is made for"):
        TextEncoder(encoder.model, other)


def test_a_damaged_text_encoder_is_one_clear_error(tmp_path: Path) -> None:
    text_encoder().save(tmp_path)
    io.write_json(tmp_path / "text_encoder" / "config.json", {"hidden_size": 15})
    with pytest.raises(ValueError, match="describes no text encoder"):
        TextEncoder.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        TextEncoder.load(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- training


def test_what_the_network_is_told(clip_run: Path) -> None:
    """Captions of the very pictures of the step, and nothing as often as it should be."""
    task: Any = tasks.make_task(configure(clip_run, caption_drop=0.5, batch_size=64))
    said = task.captions.draw(task.indices(3), 0, 3)
    assert all(PLACES[where] in caption for caption, where in zip(said, task.batch(3)[1]))
    told = task.told(3, np.random.default_rng(0))
    nothing = task.text([""] * 64)
    dropped = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(told, nothing)])
    assert 16 < dropped.sum() < 48
    np.testing.assert_allclose(told[~dropped], task.text(said)[~dropped], atol=1e-6)


def test_captions_that_are_too_long_are_told_of_once(
    clip_run: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    assert tasks.make_task(configure(clip_run)).notes == ()
    few = lights(64, "train")
    told = Captions((("lit",), ("upper left, " * 5 + "lit",), ("lit!",), ("lit?",)), np.arange(64) % 4)
    monkeypatch.setitem(sources.SOURCES, "lights", sources.Source(lambda asked: replace(few, captions=told), "lights"))
    task: Any = tasks.make_task(configure(clip_run, caption_drop=0.0))
    (note,) = task.notes
    assert note.startswith(f"1 of 4 captions have more than the text encoder's {LENGTH - 2} tokens, such as 'upper left, upper")
    task.told(0, np.random.default_rng(0))
    assert not recwarn.list


def test_the_text_encoder_is_frozen_and_travels_with_the_run(clip_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip_run, tmp_path / "clip")
    run = Run.create(tmp_path / "run", configure(copy))
    trainer = train.train(run)
    assert not any("text" in name for name, _ in trainer.model.named_parameters())
    shutil.rmtree(copy)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    pipeline = TextPipeline.load(moved)
    assert pipeline.text.hash == text_encoder().hash
    assert pipeline.draw(["light"], [0], steps=2).shape == (1, 8, 8, 1)
    assert (moved / "samples" / "step-000004.png").is_file()


def test_checkpointed_training_is_the_same(clip_run: Path) -> None:
    check_checkpointing(lambda checkpointing: configure(clip_run, gradient_checkpointing=checkpointing))


def test_a_resumed_run_ends_in_the_same_bits(clip_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the run that the text encoder came from is gone."""
    whole = train.train(Run.create(tmp_path / "whole", configure(clip_run, steps=6)))
    copy = shutil.copytree(clip_run, tmp_path / "clip")
    run = Run.create(tmp_path / "parts", configure(copy, steps=6))
    task = tasks.make_task(run.config)
    half = train.Trainer(task, 6)
    task.store(run.model)
    for _ in range(3):
        half.advance()
    half.save(run)
    shutil.rmtree(copy)
    resumed = train.train(Run.open(tmp_path / "parts"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        np.testing.assert_array_equal(a.data, b.data, err_msg=name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": ""}, ValueError, "no text encoder: train one with"),
        ({"text": "/no/such/run"}, ValueError, "no such run folder"),
        ({"caption_drop": 1.5}, ValueError, "caption_drop = 1.5"),
    ],
)
def test_bad_options(clip_run: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tasks.make_task(configure(clip_run) | options)


def test_data_needs_captions(clip_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = lights(8, "train")
    monkeypatch.setitem(sources.SOURCES, "dark", sources.Source(lambda _: Dataset(silent.images, None, "dark"), "dark"))
    with pytest.raises(ValueError, match="data 'dark' has no captions"):
        tasks.make_task(configure(clip_run, data="dark"))


def test_another_text_encoder_is_noticed(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    text_encoder(seed=1).save(copy / "model")
    with pytest.raises(ValueError, match="was trained with the text encoder"):
        TextPipeline.load(copy)


# ----------------------------------------------------------------------------------------------------------------- drawing


def test_guidance_leads_from_the_negative_prompt_to_the_prompt(trained: Path) -> None:
    """At 0 all is as if the negative prompt had been the prompt, at 1 as if there were none."""
    pipeline = TextPipeline.load(trained)
    a, b = ["light in the upper left"] * 2, ["light in the lower right"] * 2
    seeds = [3, 4]

    def draw(prompts: list[str], guidance: float, negative: str = "") -> np.ndarray:
        return pipeline.draw(prompts, seeds, guidance=guidance, negative=negative, steps=6).astype(int)

    assert np.abs(draw(a, 0, b[0]) - draw(b, 1)).max() <= 1
    assert np.abs(draw(a, 1, b[0]) - draw(a, 1)).max() <= 1
    assert np.abs(draw(a, 3, b[0]) - draw(a, 3)).max() > 5


def test_pictures_do_not_see_each_other(trained: Path) -> None:
    pipeline = TextPipeline.load(trained)
    prompts = ["light in the upper left", "the lower left is lit", "light"]
    together = pipeline.draw(prompts, [1, 2, 3], steps=4, batch_size=2).astype(int)
    for i, prompt in enumerate(prompts):
        assert np.abs(pipeline.draw([prompt], [i + 1], steps=4)[0] - together[i]).max() <= 1


def test_a_walk_passes_through_its_prompts(trained: Path) -> None:
    pipeline = TextPipeline.load(trained)
    prompts = ["light in the upper left", "light in the lower right", "the upper right is lit"]
    film = pipeline.walk(prompts, 3, seed=7, steps=8).astype(int)
    assert film.shape == (7, 8, 8, 1)
    stops = pipeline.draw(prompts, [7, 7, 7], steps=8).astype(int)
    assert np.abs(film[::3] - stops).max() <= 1
    assert lit(film[::3]).tolist() == [0, 3, 1]
    with pytest.raises(ValueError, match="at least two prompts"):
        pipeline.walk(prompts[:1], 3, seed=0)


def test_where_words_were_looked_at(trained: Path, tmp_path: Path) -> None:
    pipeline = TextPipeline.load(trained)
    prompt = "light in the upper left"
    picture, words, maps = pipeline.look(prompt, 2, steps=4)
    np.testing.assert_array_equal(picture, pipeline.draw([prompt], [2], steps=4)[0])
    assert "".join(words) == prompt.replace(" ", "")
    assert maps.shape == (8, 8, len(words)) and (maps > 0).all() and (maps.sum(-1) < 1).all()
    figures.attention_figure([(picture, words, maps)], tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_as_many_prompts_as_seeds(trained: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 seeds"):
        TextPipeline.load(trained).draw(["a", "b"], [0])


# -------------------------------------------------------------------------------------------------------- the command line


def test_the_command_line_draws_what_is_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, npz, maps = tmp_path / "grid.png", tmp_path / "all.npz", tmp_path / "maps.png"
    command = ["sample", str(trained), "--prompt", "light in the upper left", "--prompt", "the lower right is lit", "--n", "6"]
    command += ["--negative", "light in the upper right", "--cfg", "3", "--steps", "8"]
    assert main([*command, "--out", str(grid), "--npz", str(npz), "--attention", str(maps)]) == 0
    assert capsys.readouterr().out.split() == [str(grid), str(npz), str(maps)]
    drawn = np.load(npz)
    assert drawn["labels"].tolist() == [0, 0, 0, 1, 1, 1] and lit(drawn["images"]).tolist() == [0, 0, 0, 3, 3, 3]
    said = images.read_png_metadata(grid)
    assert json.loads(said["prompt"]) == ["light in the upper left", "the lower right is lit"]
    assert said["negative"] == "light in the upper right" and said["guidance"] == "3.0" and "class" not in said
    looked = images.read_png_metadata(maps)
    assert looked["seeds"] == "0" != said["seeds"]
    assert {name: text for name, text in looked.items() if name != "seeds"} == {k: v for k, v in said.items() if k != "seeds"}


def test_the_command_line_films_the_way_between_prompts(trained: Path, tmp_path: Path) -> None:
    gif = tmp_path / "film.gif"
    command = ["sample", str(trained), "--prompt", "light in the upper left", "--prompt", "the lower right is lit"]
    assert main([*command, "--interpolate", "4", "--seeds", "3", "--steps", "4", "--gif", str(gif)]) == 0
    with Image.open(gif) as film:
        assert film.n_frames == 5  # type: ignore[attr-defined]


def test_the_command_line_says_what_was_dropped(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "upper left, upper left, upper left, upper left, lit"
    files = ["--out", str(tmp_path / "a.png"), "--attention", str(tmp_path / "b.png")]
    assert main(["sample", str(trained), "--prompt", prompt, "--n", "2", "--steps", "2", *files]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "arning" in line or "dropped" in line]
    assert len(lines) == 1 and lines[0].startswith(f"tinydiff: warning: {prompt!r}") and "dropped" in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to draw with --prompt"),
        (["--class", "3"], "not --class"),
        (["--prompt", "a", "--prompt", "b", "--interpolate", "2", "--n", "3"], "keeps one noise"),
    ],
)
def test_bad_command_lines(trained: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(trained), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--prompt", "a seven"], ["--negative", "a seven"], ["--attention", "a.png"]])
def test_a_model_told_classes_knows_no_words(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "digits", *options]) == 2
    assert "knows no words" in capsys.readouterr().err


def test_the_demo_with_words_trains_the_chain_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinydiff import demo
    from tinydiff.tasks.autoencoder import AutoencoderTask
    from tinydiff.tasks.clip import ClipTask
    from tinydiff.tasks.text_to_image import TextToImageTask

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = {"projection_dim": 8, "text_config": text | {"max_position_embeddings": 32}}
    vision = {"hidden_size": 8, "widths": [8, 8], "norm_num_groups": 4}
    monkeypatch.setitem(ClipTask.PRESETS, "small", {"batch_size": 16, "model": tiny | {"vision_config": vision}})
    monkeypatch.setitem(TextToImageTask.PRESETS, "small", {"model": UNET})
    monkeypatch.setitem(TextToImageTask.LATENT_WIDTHS, "small", [16, 16])
    monkeypatch.setitem(AutoencoderTask.PRESETS, "small", {"width": 4, "model": {"layers_per_block": 1, "norm_num_groups": 4}})
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "COLUMNS", 2)
    command = ["demo", "--words", "--steps", "2", "--out", str(tmp_path / "demo"), "--prompt", "a seven"]
    assert main(command) == 0
    first = (tmp_path / "demo" / "words.png").read_bytes()
    printed = capsys.readouterr()
    assert "words.png: a row each for 'a seven'" in printed.out
    assert "warning: the loss is that of guessing among a batch" in printed.err  # after two steps, the encoders'
    assert (tmp_path / "demo" / "attention.png").is_file()
    drawn = TextPipeline.load(tmp_path / "demo" / "run")
    assert drawn.space.size == (7, 7, 4) and drawn.text.hash == TextEncoder.of_run(tmp_path / "demo" / "clip").hash
    assert main(command) == 0  # nothing is trained a second time
    assert "trained" not in capsys.readouterr().out
    assert (tmp_path / "demo" / "words.png").read_bytes() == first
    assert main(["demo", "--prompt", "a seven"]) == 2


# ----------------------------------------------------------------------------------------------------------------- judging


def test_digit_prompts_are_spread_over_classes_and_phrasings() -> None:
    test = data.load("digits", "test")
    prompts, labels = faithfulness.digit_prompts(test, 400)
    assert len(set(prompts)) == 200 and np.bincount(labels).tolist() == [40] * 10
    training = data.load("digits").captions
    assert training is not None and test.captions is not None and not set(prompts) & set(training.every())
    assert all(prompt in test.captions.phrasings[label] for prompt, label in zip(prompts, labels))


def test_shapes_are_judged_by_what_is_read_in_them() -> None:
    test = data.load("shapes:300", "test")
    assert test.captions is not None
    prompts = test.captions.draw(np.arange(len(test)), 0, 0)
    right = faithfulness.judge_shapes(test.images, prompts)
    assert right["accuracy"].mean() >= 0.9 and set(right) == {"accuracy", "colour", "shape", "relation", "size"}
    wrong = faithfulness.judge_shapes(np.roll(test.images, 1, axis=0), prompts)
    assert wrong["accuracy"].mean() <= 0.1
    scene = shapes.parse("a red circle above a blue square")
    picture = shapes.draw(scene, 32, np.random.default_rng(0))
    for text, wanted in {
        "a red circle above a blue square": (True, True, True, True),
        "a blue square above a red circle": (False, True, True, False),
        "a blue circle above a red square": (False, False, True, True),
        "a red square above a blue circle": (False, True, False, True),
    }.items():
        verdict = faithfulness.judge_shapes(picture[None], [text])
        assert tuple(bool(verdict[name][0]) for name in ("accuracy", "colour", "shape", "relation")) == wanted, text
