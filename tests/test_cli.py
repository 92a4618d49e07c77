"""The command line: what it makes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinydiff import __version__
from tinydiff.cli import main
from tinydiff.images import read_image

SMALL_UNET = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
DENOISER = ["--batch-size", "4", "--set", "showings=0", *(f"--set=model.{k}={json.dumps(v)}" for k, v in SMALL_UNET.items())]
CLASSIFIER = ["--batch-size", "4", "--set", "showings=0", "--set=model.widths=[4,8]", "--set=model.norm_num_groups=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A denoiser and a classifier that have hardly learned."""
    folder = tmp_path_factory.mktemp("runs")
    for task, options in (("denoiser", DENOISER), ("classifier", CLASSIFIER)):
        assert main(["train", task, "--out", str(folder / task), "--steps", "2", *options]) == 0
    return {task: str(folder / task) for task in ("denoiser", "classifier")}


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a command that must fail with this code; returns its one line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tinydiff: error: "), lines
    return lines[0]


# Help and mistakes.


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for command in ("demo", "train", "sample", "dream", "eval", "gradcheck", "doctor", "data", "schedules"):
        assert f"\n  {command} " in shown
        assert main([command, "--help"]) == 0
        assert "Usage: tinydiff " + command in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tinydiff {__version__}\n"


def test_help_loads_neither_numba_nor_matplotlib() -> None:
    program = (
        "import sys; from tinydiff.cli import main; main(['sample', '--help']); "
        "print([m for m in ('numba', 'matplotlib', 'rich', 'PIL', 'pooch', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tinydiff", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "tinydiff: error: unknown command 'trian': did you mean 'train'?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smaple"], "did you mean 'sample'?"),
        (["sample", "RUN", "--stpes", "3"], "--steps"),
        (["sample", "RUN", "--out", "no/such/folder.png"], "no folder no/such"),
        (["sample", "RUN", "--sampler", "ddmi", "--out", "a.png"], "'ddmi' is not one of"),
        (["sample", "RUN", "--steps", "0", "--out", "a.png"], "0 is not in the range"),
        (["sample", "RUN", "--class", "10", "--out", "a.png"], "--class 10: the model knows classes 0 to 9"),
        (["sample", "RUN", "--class", "three", "--out", "a.png"], "'three': write 7"),
        (["sample", "RUN", "--class", "-1", "--out", "a.png"], "'-1': write 7"),
        (["sample", "RUN", "--seeds", "5-2", "--out", "a.png"], "write 2-5"),
        (["sample", "RUN", "--seeds", "0-9999999999", "--out", "a.png"], "more than 1,000,000"),
        (["sample", "RUN", "--seeds", "0-3", "--n", "5", "--out", "a.png"], "--n is 5, but --seeds gives 4"),
        (["sample", "RUN", "--eta", "0.5", "--sampler", "heun", "--out", "a.png"], "--eta is for the sampler ddim"),
        (["sample", "RUN", "--cfg", "nan", "--out", "a.png"], "--cfg"),
        (["sample", "RUN", "--device", "cuda", "--out", "a.png"], "device='cpu'"),
        (["train", "denoisr", "--out", "new"], "did you mean 'denoiser'?"),
        (["train", "denoiser"], "--out"),
        (["train", "denoiser", "--out", "new", "--steps", "2", "--minutes", "1"], "exclude each other"),
        (["train", "denoiser", "--out", "new", "--set", "lrr=1"], "did you mean 'lr'?"),
        (["train", "denoiser", "--out", "new", "--set", "lr"], "write NAME=VALUE"),
        (["train", "denoiser", "--out", "new", "--set", "lr=null"], "option lr = None"),
        (["train", "denoiser", "--out", "new", "--set", "steps=foo"], "option steps = 'foo': it should be like 1000"),
        (["train", "classifier", "--out", "new", "--predict", "v"], "unknown option of classifier 'predict'"),
        (["train", "denoiser", "--out", "new", "--resume"], "holds no run to resume"),
        (["train", "denoiser", "--out", "RUN", "--resume", "--steps", "3"], "started with steps = 2, not 3"),
        (["train", "denoiser", "--out", "RUN", "--resume", "--set", "model.norm_num_groups=4"], "norm_num_groups = 2, not 4"),
        (["dream", "--class", "12", "--classifier", "JUDGE"], "classes 0 to 9"),
        (["gradcheck", "sofmax"], "did you mean 'softmax'"),
        (["schedules", "--out", "a.png", "--index", "1000"], "1000 test pictures"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    arguments: list[str],
    words: str,
    runs: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": runs["denoiser"], "JUDGE": runs["classifier"]}
    assert words in fails(capsys, 2, *(names.get(a, a) for a in arguments))
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "nowhere", "--out", "a.png"], "nowhere: no such run folder"),
        (["sample", "no\nwhere", "--out", "a.png"], "no where: no such run folder"),
        (["sample", ".", "--out", "a.png"], "holds no model yet"),
        (["sample", "JUDGE", "--out", "a.png"], "holds a classifier, and a denoiser is needed"),
        (["train", "denoiser", "--out", "new", "--data", "digitz"], "did you mean 'digits'?"),
        (["train", "denoiser", "--out", "new", "--predict", "nose"], "did you mean 'noise'?"),
        (["train", "denoiser", "--out", "new", "--set", "model.norm_num_groups=7"], "must divide"),
        (["train", "denoiser", "--out", "new", "--steps", "1", "--set", "ema=2"], "EMA decay must be in [0, 1), not 2"),
        (["train", "denoiser", "--out", "new", "--steps", "1", "--set", "betas=[2,2]"], "betas must be in [0, 1)"),
        (["train", "denoiser", "--out", "new", "--steps", "1", "--set", "min_snr=-1"], "option min_snr = -1"),
        (["train", "denoiser", "--out", "new", "--steps", "1", "--set", "pad=-1"], "pad is -1"),
        (["train", "denoiser", "--out", "new", "--steps", "1", "--set", "class_drop=3"], "option class_drop = 3"),
        (["train", "classifier", "--out", "new", "--steps", "1", "--set", "noisy=-1"], "option noisy = -1"),
        (
            ["train", "denoiser", "--out", "new", "--steps", "1", "--set", "model.num_class_embeds=3"],
            "num_class_embeds is 3; expected 11",
        ),
        (
            ["train", "denoiser", "--out", "new", "--steps", "1", *DENOISER, "--set", "model.num_class_embeds=null"],
            "no class_embedding",
        ),
        (["train", "denoiser", "--out", "RUN", "--steps", "2"], "already holds a run"),
        (["train", "denoiser", "--out", "RUN", "--resume"], "is finished"),
        (["eval", "RUN", "--n", "6000", "--classifier", "JUDGE"], "choose at most 5000"),
        (["eval", "JUDGE", "--data", "folder:."], "no pictures"),
        (["dream", "--from", "nothing.png", "--classifier", "JUDGE"], "no such file: nothing.png"),
        (["data", "fetch", "mnits"], "mnits"),
        (["data", "info", "mnist:nowhere"], "nowhere"),
    ],
)
def test_what_goes_wrong_is_one_line(
    arguments: list[str],
    words: str,
    runs: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": runs["denoiser"], "JUDGE": runs["classifier"]}
    assert words in fails(capsys, 1, *(names.get(a, a) for a in arguments))
    assert not list(tmp_path.iterdir())


def test_corrupt_weights_are_one_line(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(runs["denoiser"]) / "model"
    weights, card = (model / "model.safetensors").read_bytes(), json.loads((model / "config.json").read_text())
    for spoiled, changed in (
        (weights[:-100], card),
        (weights, card | {"task": "poet"}),
        (weights, {}),
        (weights, card | {"shape": 3}),
        (weights, card | {"schedule": "wavy"}),
        (weights, card | {"model": {"block_out_channels": "wide"}}),
        (weights, card | {"model": card["model"] | {"num_class_embeds": 3}}),
        (weights, card | {"model": card["model"] | {"layers_per_block": 10**9}}),
        (weights, card | {"model": card["model"] | {"block_out_channels": [4, 10**9]}}),
        (weights, card | {"task": "classifier", "model": {"num_classes": 9}}),
    ):
        (tmp_path / "model.safetensors").write_bytes(spoiled)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert str(tmp_path) in fails(capsys, 1, "sample", tmp_path, "--out", tmp_path / "a.png")


@pytest.mark.parametrize("error", [KeyError("name"), IndexError("too far"), AttributeError("no such thing")])
def test_what_a_strange_file_leads_to_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(run: str, device: str) -> None:
        raise error

    monkeypatch.setattr("tinydiff.prompts.load_pipeline", load)
    assert str(error) in fails(capsys, 1, "sample", "strange")


def test_traceback_is_there_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--traceback", "sample", str(tmp_path / "none"), "--out", str(tmp_path / "a.png")]) == 1
    assert "Traceback" in capsys.readouterr().err


# Training.


def test_a_run_folder_is_complete(runs: dict[str, str]) -> None:
    run = Path(runs["denoiser"])
    assert {p.name for p in run.iterdir()} == {"config.json", "stats.jsonl", "log.txt", "samples", "model", "state"}
    config = json.loads((run / "config.json").read_text())
    assert config["task"] == "denoiser" and config["steps"] == 2 and config["model"]["block_out_channels"] == [4, 8]
    assert [json.loads(line)["step"] for line in (run / "stats.jsonl").read_text().splitlines()] == [1, 2]
    assert {p.name for p in (run / "model").iterdir()} == {"model.safetensors", "config.json"}


def test_training_prints_its_result_and_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "classifier", "--out", str(tmp_path / "r"), "--steps", "1", "--json", *CLASSIFIER]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["steps"] == 1 and result["loss"] > 0 and len(result["weights"]) == 12
    assert "training" not in printed.err  # stderr is no terminal here


# Drawing.


def test_samples_have_the_data_s_size_and_the_labels_asked_for(runs: dict[str, str], tmp_path: Path) -> None:
    npz = tmp_path / "s.npz"
    command = ["sample", runs["denoiser"], "--class", "1,4", "--n", "5", "--steps", "2", "--npz", str(npz)]
    assert main(command) == 0
    with np.load(npz, allow_pickle=False) as stored:
        assert sorted(stored) == ["images", "labels"]
        assert stored["images"].shape == (5, 28, 28) and stored["images"].dtype == np.uint8
        assert stored["labels"].tolist() == [1, 1, 1, 4, 4]
        first = stored["images"]
    assert main([*command, "--seeds", "0-4"]) == 0
    with np.load(npz) as stored:
        np.testing.assert_array_equal(stored["images"], first)  # seeds count from 0
    assert main([*command, "--seeds", "1"]) == 0
    with np.load(npz) as stored:
        assert np.abs(stored["images"][0].astype(int) - first[1].astype(int)).max() <= 1  # the picture of seed 1
        assert np.abs(stored["images"][0].astype(int) - first[0].astype(int)).max() > 1


def test_a_grid_carries_its_settings(runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, gif = tmp_path / "g.png", tmp_path / "f.gif"
    capsys.readouterr()
    command = ["sample", runs["denoiser"], "--class", "0-2", "--n", "6", "--steps", "3", "--sampler", "heun"]
    assert main([*command, "--cfg", "1.5", "--seeds", "7", "--out", str(out), "--gif", str(gif)]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(gif)]
    with Image.open(out) as picture:
        assert picture.size == ((2 * 29 - 1) * 2, (3 * 29 - 1) * 2)  # a row for each class, twice as large
        text = picture.text  # type: ignore[attr-defined]
    assert text["seeds"] == "7-12" and text["sampler"] == "heun" and text["steps"] == "3" and text["guidance"] == "1.5"
    assert json.loads(text["class"]) == [0, 1, 2] and __version__ in text["software"]
    metadata_hash = text["weights"]
    with Image.open(gif) as film:
        assert film.n_frames == 4  # type: ignore[attr-defined]
    capsys.readouterr()
    assert main([*command, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == metadata_hash


def test_with_nothing_said_a_grid_of_all_classes_is_drawn(
    runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["sample", runs["denoiser"], "--steps", "1"]) == 0
    assert capsys.readouterr().out == "samples.png\n"
    with Image.open("samples.png") as picture:
        assert picture.size == ((8 * 29 - 1) * 2, (10 * 29 - 1) * 2)


def test_evaluation_prints_what_a_program_can_read(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", runs["denoiser"], "--n", "20", "--steps", "2", "--classifier", runs["classifier"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 20 and found["fid"] > found["floor"] > 0  # a model that has not learned is worse than real pictures
    assert 0 <= found["accuracy"] <= 1 and len(found["classifier"]) == 12
    assert main(["eval", runs["classifier"], "--n", "100", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    assert main(["eval", runs["classifier"], "--n", "100"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_dreams_are_written_and_the_two_gradients_compared(
    runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "dream"
    assert main(["dream", "--class", "3", "--steps", "5", "--classifier", runs["classifier"], "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "784" in shown or "1,568" in shown
    assert "P(3) went from" in shown  # up, it may be
    assert {p.name for p in out.iterdir()} == {"film.gif", "picture.png", "curve.png", "gradient.png"}
    with Image.open(out / "picture.png") as picture:
        assert picture.size == (224, 224) and picture.text["class"] == "3"  # type: ignore[attr-defined]


def test_the_demo_makes_and_names_its_pictures(
    runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinydiff import demo, tasks

    monkeypatch.setitem(tasks.DenoiserTask.PRESETS, "small", {"batch_size": 4, "showings": 0, "model": SMALL_UNET})
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "COLUMNS", 2)
    out = tmp_path / "demo"
    command = ["demo", "--steps", "2", "--out", str(out), "--classifier", runs["classifier"]]
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    for name in ("digits.png", "film.gif", "loss.png", "gradient.png"):
        assert str(out / name) in shown
        with Image.open(out / name) as picture:
            assert picture.width > 50
    weights = (out / "run" / "model" / "model.safetensors").read_bytes()
    assert main(command) == 0  # once more: it draws again, and trains no more
    assert (out / "run" / "model" / "model.safetensors").read_bytes() == weights


def test_schedules_are_drawn(tmp_path: Path) -> None:
    assert main(["schedules", "--out", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 500


# Looking after the machine.


def test_gradcheck_prints_errors_and_fails_on_a_wrong_derivative(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    assert main(["gradcheck", "exp", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["op"] == "exp" and 0 < row["first"] < 1e-6 and 0 < row["second"] < 1e-6 and row["ok"]
    monkeypatch.setattr(sys.modules["tinydiff.gradcheck"], "worst_errors", lambda name: (0.5, 1e-9))
    assert main(["gradcheck", "exp"]) == 1
    assert "above" in capsys.readouterr().out


def test_doctor_finds_what_slows_down(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tinydiff import doctor

    capsys.readouterr()
    assert main(["doctor", "--json"]) == 0
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["tinydiff"]["found"].startswith(__version__)
    assert str(os.cpu_count()) in found["device cpu"]["found"] or hasattr(os, "sched_getaffinity")
    assert "threading layer" in found["Numba"]["found"] and "compiled kernels" in found["kernel cache"]["found"]
    assert main(["doctor"]) == 0
    assert "BLAS" in capsys.readouterr().out

    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setattr(doctor, "_kernel_unforced", lambda: "Zen 9")
    (blas,) = [row for row in doctor.examine() if row.what == "BLAS"]
    assert blas.status == "warning" and "unset it to get Zen 9" in blas.fix


@pytest.mark.parametrize("question", ["td.get_num_threads()", "next(tinydiff.doctor._numba())"])
def test_asking_for_threads_starts_the_pool_as_kernels_want_it(question: str) -> None:
    program = (
        "import sys, numba, tinydiff as td, tinydiff.doctor; ask = numba.get_num_threads; early = []; "
        "numba.get_num_threads = lambda: early.append('tinydiff.kernels.jit' not in sys.modules) or ask(); "
        f"{question}; print(early)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[False]\n"


def test_fetching_takes_its_folder_as_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinydiff import data

    asked: list[object] = []
    monkeypatch.setattr(data, "fetch", lambda *arguments: asked.extend(arguments))
    assert main(["data", "fetch", "mnist", "--out", str(tmp_path / "here")]) == 0
    assert asked[:2] == ["mnist", tmp_path / "here"]


def test_data_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["data", "info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train"], found["test"], found["shape"]) == (10_000, 1_000, [28, 28, 1])
    assert found["classes"]["7"] == 1000
    assert main(["data", "info", "digits"]) == 0
    assert "10000" in capsys.readouterr().out


def test_data_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tinydiff import data

    sheet = tmp_path / "sheet.png"
    assert main(["data", "info", "shapes:30", "--size", "64", "--n", "13", "--out", str(sheet)]) == 0
    assert "small orange circle left of a large purple triangle" in capsys.readouterr().out
    drawn = read_image(sheet)
    assert drawn.shape == (2 * 65 - 1, 12 * 65 - 1, 3)
    first, last = data.load("shapes:30", size=64).images[[0, 12]]
    assert np.array_equal(drawn[:64, :64], first)
    assert np.array_equal(drawn[65:, :64], last)
