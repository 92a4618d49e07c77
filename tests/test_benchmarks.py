"""The benchmark harness: that it times only what is right, and tells fast from slow."""

from __future__ import annotations

import io
import json
import mmap
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import tinydiff as td
from benchmarks import __main__ as command
from benchmarks import conv, figures, harness, memory, overhead, scaling, start
from benchmarks.harness import Bench, Case, Settings, Side

SHAPE = conv.Shape(2, 7, 6, 3, 4, 3, 2, 1)


@pytest.fixture(scope="module")
def quick() -> Bench:
    return Bench(Settings(quick=True), Console(file=io.StringIO()))


@pytest.fixture
def bench(quick: Bench) -> Bench:
    quick.rows.clear()
    return quick


def values() -> np.ndarray:
    return np.linspace(0, 1, 12).reshape(3, 4)


def side(function: Any) -> Side:
    return Side(function, lambda result: [result])


def test_equal_work_is_timed(bench: Bench) -> None:
    row = bench.run(Case("s", "equal", side(values), {"them": side(values)}, target=1e-9, flops=1e6))
    assert row["wrong"] is None and row["met"] and row["variant"] == "them"
    assert row["ratio"] == pytest.approx(row["theirs_ms"] / row["ours_ms"])
    assert row["gflops"] == pytest.approx(1e6 / (row["ours_ms"] / 1000) / 1e9)
    assert row["share_of_sgemm"] == pytest.approx(row["gflops"] / bench.sgemm)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: values() + 1e-3, "differs by 1.0e-03"),
        (lambda: values().T, "shapes"),
        (lambda: np.full((3, 4), np.nan), "differs by nan"),
    ],
)
def test_wrong_result_is_reported_and_never_timed(bench: Bench, wrong: Any, message: str) -> None:
    calls = []
    row = bench.run(Case("s", "wrong", side(lambda: calls.append(1) or wrong()), {"them": side(values)}, target=0.1))
    assert message in row["wrong"]
    assert row["ours_ms"] is None and row["ratio"] is None and row["met"] is False
    assert len(calls) == 1


def test_every_variant_is_checked(bench: Bench) -> None:
    variants = {"right": side(values), "other": side(lambda: values() * 2)}
    assert "(other)" in bench.run(Case("s", "c", side(values), variants))["wrong"]


def test_tolerance_is_relative_to_the_largest() -> None:
    big = np.array([1000.0, 1.0])
    assert harness.difference([big + 0.05], [big], 1e-4) is None
    assert harness.difference([big + 0.2], [big], 1e-4) is not None


def test_work_is_counted_where_it_is_not_known(bench: Bench) -> None:
    x, y = td.tensor(np.ones((40, 50), np.float32)), td.tensor(np.ones((50, 60), np.float32))
    product = Side(lambda: x @ y, lambda result: [result.numpy()])
    flops, bytes_ = 2 * 40 * 50 * 60, 4 * (40 * 50 + 50 * 60 + 40 * 60)
    for case in (Case("s", "product", product, counted=True), Case("s", "twice", product, flops=2 * flops, counted=True)):
        row = bench.run(case)
        seconds = row["ours_ms"] / 1000
        assert row["gflops"] == pytest.approx((case.flops or flops) / seconds / 1e9)
        assert row["gbs"] == pytest.approx(bytes_ / seconds / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gbs"] / bench.copy)
    out = io.StringIO()
    Console(file=out, width=180).print(harness.table(bench.rows, bench))
    assert "GB/s" in out.getvalue() and "% sgemm, " in out.getvalue() and "% copy" in out.getvalue()
    assert bench.run(Case("s", "not asked", product)).get("gflops") is None


def test_slowed_kernel_is_reported_slower(bench: Bench) -> None:
    def slowed() -> np.ndarray:
        time.sleep(0.02)
        return values()

    assert bench.run(Case("s", "slow", side(slowed), {"them": side(values)}, target=1.0))["met"] is False
    row = bench.run(Case("s", "fast", side(values), {"slow": side(slowed), "quick": side(values)}, target=1.0))
    assert row["variant"] == "quick"
    assert bench.run(Case("s", "fast", side(values), {"slow": side(slowed)}, target=1.0))["met"] is True


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def contender(name: str) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(1.1 * harness.SHORT)

        return run

    times = harness.measure({"ours": contender("ours"), "a": contender("a"), "b": contender("b")}, Settings(repeat=4))
    assert {name: len(found) for name, found in times.items()} == {"ours": 4, "a": 4, "b": 4}
    assert order[-12:] == ["ours", "a", "b"] * 4


def test_without_an_opponent(bench: Bench) -> None:
    row = bench.run(Case("s", "alone", side(values), target=2.0))
    assert row["ours_ms"] > 0 and row["theirs_ms"] is row["ratio"] is row["met"] is None
    assert bench.run(Case("s", "bad", side(lambda: np.array([np.inf]))))["wrong"] == "not finite"


def test_geometric_mean(bench: Bench) -> None:
    rows: list[dict[str, Any]] = [{"ratio": 4.0, "wrong": None}, {"ratio": 1.0, "wrong": None}]
    bench.mean("s", "mean", rows, 1.9)
    assert bench.rows[-1]["ratio"] == pytest.approx(2) and bench.rows[-1]["met"] is True
    bench.mean("s", "mean", [*rows, {"ratio": None, "wrong": "differs"}], 1.9)
    assert bench.rows[-1]["met"] is False


def test_json_and_compare(bench: Bench, tmp_path: Path) -> None:
    bench.run(Case("s", "x", side(values), {"them": side(values)}))
    harness.save(tmp_path / "a.json", bench.rows)
    before = harness.read(tmp_path / "a.json")
    assert before == bench.rows
    assert {"suite", "case", "ours_ms", "theirs_ms", "ratio", "target", "met"} <= set(before[0])

    after = [before[0] | {"ratio": before[0]["ratio"] * 2, "ours_ms": before[0]["ours_ms"] / 2}, before[0] | {"case": "new"}]
    harness.save(tmp_path / "b.json", after)
    result = CliRunner().invoke(command.main, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert result.exit_code == 0 and "2.00" in result.output and "new" not in result.output


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"suite": "s"}]'])
def test_reading_what_is_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="write it with --json"):
        harness.read(tmp_path / "rows.json")


def test_table_shows_every_row(bench: Bench) -> None:
    bench.run(Case("s", "right", side(values), {"them": side(values)}, target=1e-9, bytes=1e6))
    bench.run(Case("s", "broken", side(lambda: values() + 1), {"them": side(values)}))
    out = io.StringIO()
    Console(file=out, width=160).print(harness.table(bench.rows, bench))
    assert "right" in out.getvalue() and "✓" in out.getvalue() and "% copy" in out.getvalue()
    assert "wrong: differs" in out.getvalue()


def test_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    assert "OPENBLAS_CORETYPE=Prescott" in harness.blas_warnings()[0]
    monkeypatch.setattr("os.getloadavg", lambda: (3.2, 0, 0), raising=False)
    assert "load 3.2" in harness.load_warnings()[0]
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 3, 3), raising=False)
    assert harness.load_warnings() == []


@pytest.mark.parametrize(
    ("kernel", "flags", "has"),
    [
        ("SkylakeX", {"avx2", "avx512f"}, None),
        ("Haswell", {"avx2", "avx512f"}, "AVX-512"),
        ("Sandybridge", {"avx2", "avx512f"}, "AVX-512"),
        ("Haswell", {"avx", "avx2"}, None),
        ("Zen", {"avx", "avx2"}, None),
        ("Nehalem", {"avx", "avx2"}, "AVX2"),
        ("Bulldozer", {"avx", "avx2"}, "AVX2"),
        ("Sandybridge", {"avx"}, None),
        ("neoversen1", set(), None),
    ],
)
def test_a_kernel_of_blas_below_the_processor_is_said(
    kernel: str, flags: set[str], has: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [{"internal_api": "openblas", "architecture": kernel}, {"internal_api": "openmp"}]
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(harness.threadpoolctl, "threadpool_info", lambda: libraries)
    monkeypatch.setattr(harness, "processor_flags", lambda: flags)
    found = harness.blas_warnings()
    assert [(kernel in text, f"has {has};" in text) for text in found] == ([(True, True)] if has else [])


def test_torch_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="pip install torch"):
        Bench(Settings(against="torch", quick=True), Console(file=io.StringIO()))


def test_peak_memory() -> None:
    if not memory.STATUS.exists():
        pytest.skip("measured through /proc")
    memory.reset_peak()
    before = memory.resident()
    with mmap.mmap(-1, 64 * 2**20) as block:  # fresh pages; NumPy might get some that were freed before, and resident all along
        for _ in range(64):
            block.write(bytes(2**20))
    assert 60 * 2**20 < memory.peak() - before < 90 * 2**20


# Convolution: algorithms and kernels of the user's own.


@pytest.mark.parametrize("shape", [SHAPE, conv.Shape(1, 5, 8, 2, 3, 3, 1, 1), conv.Shape(2, 4, 4, 5, 2, 1, 1, 0)], ids=str)
def test_algorithms_agree(shape: conv.Shape) -> None:
    x, w, _ = conv.arrays(shape)
    expected = conv.naive(x, w, shape.s, shape.p)
    served = 0
    for name, forward in conv.all_algorithms().items():
        try:
            found = forward(x, w, shape.s, shape.p)
        except NotImplementedError:
            continue
        served += 1
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    assert served >= 4


def test_shapes_of_the_users() -> None:
    assert conv.Shape.parse("2,7,6,3,4,3,2,1") == SHAPE
    assert SHAPE.out == (4, 3) and SHAPE.flops == 2 * 2 * 4 * 3 * 4 * 27
    for bad in ("1,2,3", "a,b,c,d,e,f,g,h", "1,2,2,1,1,5,1,0", "0,7,6,3,4,3,1,1"):
        with pytest.raises(ValueError, match="--shape"):
            conv.Shape.parse(bad)


def test_users_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One right and one wrong, through the command line: the right one is timed, the wrong one called wrong."""
    monkeypatch.setattr(conv, "USERS", {})
    source = (
        "from benchmarks.conv import im2col, register\n"
        "register('mine', lambda x, w, stride, padding: im2col(x, w, stride, padding))\n"
        "register('broken', lambda x, w, stride, padding: 1.01 * im2col(x, w, stride, padding))\n"
    )
    (tmp_path / "mine.py").write_text(source)
    arguments = ["conv", "--quick", "--shape", "2,7,6,3,4,3,2,1", "--kernel", str(tmp_path / "mine.py")]
    result = CliRunner().invoke(command.main, [*arguments, "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    rows = {row.get("algorithm", row["case"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["mine"]["ours_ms"] > 0 and rows["mine"]["wrong"] is None
    assert rows["broken"]["ours_ms"] is None and "differs" in rows["broken"]["wrong"]
    for direction in conv.DIRECTIONS:
        assert rows[f"{SHAPE}, {direction}"]["ours_ms"] > 0
    assert "mine" in result.output

    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="registers no kernel"):
        conv.load_kernels(str(tmp_path / "empty.py"))


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "conv", "--shape", "1,2"])
    with pytest.raises(SystemExit) as stop:
        command.cli()
    error = capsys.readouterr().err.strip()
    assert stop.value.code != 0 and error.startswith("benchmarks: error: --shape '1,2'") and "\n" not in error


def test_chain_without_an_opponent(bench: Bench) -> None:
    for case in overhead.cases(bench, 30):
        assert case.ours.run() is not None
        y, gradient = case.ours.arrays(case.ours.run())
        x = np.linspace(0.1, 1, 4)
        slope = np.ones(4)
        for _ in range(10):
            slope *= 1.1 * np.cos(1.1 * x + 0.3)
            x = np.sin(1.1 * x + 0.3)
        np.testing.assert_allclose(y, x, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4)


def test_figures(tmp_path: Path) -> None:
    row = {"suite": "s", "case": "c", "ours_ms": 1.0, "theirs_ms": 2.0, "ratio": 2.0, "target": 1.5, "met": True}
    point = row | {"suite": "scaling", "sweep": "batch", "value": 4, "ours_ps_per_flop": 3.0}
    assert [path.name for path in figures.draw([row, point], tmp_path)] == ["ratios.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    from tinydiff.hooks import profile

    with profile() as found:
        x = td.tensor(np.ones(3), requires_grad=True)
        (x * x).sum().backward()
    assert figures.step_profile(found, tmp_path / "step.png").stat().st_size > 1000


def test_start_up_is_held_against_limits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling takes is the difference of the first two runs; both rows say what they are at most to be."""
    times = iter([31.0, 5.0, 9.0, 1.25, 1.75, 1.625])
    commands = []
    monkeypatch.setattr(start, "seconds", lambda cache, threads, *command: commands.append(command) or next(times))
    monkeypatch.setattr(bench.settings, "quick", False)
    start.run(bench)
    compiling, picture = bench.rows
    assert [command[0] for command in commands] == ["demo"] * 2 + ["sample"] * 4
    assert commands[0][-1] != commands[1][-1]  # or the second run would find a trained model
    assert (compiling["ours_ms"], compiling["most_ms"], compiling["met"]) == (26_000, 25_000, False)
    assert (picture["ours_ms"], picture["most_ms"], picture["met"]) == (1625, 1500, False)
    assert start.summary("x", 25.0, 25.0)["met"] is True
    out = io.StringIO()
    Console(file=out, width=160).print(harness.table(bench.rows, bench))
    assert "26.0 s (at most 25: not met)" in out.getvalue()


def test_a_command_is_timed_with_a_cache_of_its_own(tmp_path: Path) -> None:
    assert 0 < start.seconds(tmp_path, 1, "doctor") < 60
    assert list(tmp_path.glob("kernels-*"))
    with pytest.raises(RuntimeError, match=r"tinydiff dmeo failed: .*demo"):
        start.seconds(tmp_path, 1, "dmeo")


def test_quality_is_held_against_its_targets() -> None:
    from benchmarks.quality import verdict

    assert verdict(0.97, 30.0)["met"] == {"accuracy": True, "fid": True}
    assert verdict(0.969, 31.0)["met"] == {"accuracy": False, "fid": False}


# Against PyTorch.

TINY: dict[str, Any] = {
    "block_out_channels": [4, 4],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}
TINY |= {"norm_num_groups": 2, "attention_head_dim": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def against() -> Bench:
    pytest.importorskip("torch")
    return Bench(Settings("torch", quick=True), Console(file=io.StringIO()))


def test_training_steps_agree(against: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of three steps are equal; with another learning rate on one side they are not, which the check sees."""
    from benchmarks import train

    config = train.preset("small", **TINY)
    batch = train.make_batch(2, config, size=8)
    assert against.check(train.step_case(against, "equal", config, batch, None)) is None
    case = train.step_case(against, "unequal", config, batch, None)
    step = case.ours.run

    def faster() -> float:
        with monkeypatch.context() as patch:  # for this step of this side only
            patch.setattr(train, "LR", 2e-2)
            return step()

    case.ours = replace(case.ours, run=faster)
    assert "differs" in (against.check(case) or "")


def test_operation_count() -> None:
    from benchmarks import train

    config = train.preset("small", **TINY, add_attention=False)
    one, four = (train.training_flops(config, train.make_batch(n, config, size=8)) for n in (1, 4))
    assert four == 4 * one
    step = train.our_step(config, train.make_batch(1, config, size=8))
    assert harness.count_work(step)[0] == pytest.approx(one, rel=0.2)  # forward and backward themselves
    first_convolution = 3 * 2 * 8 * 8 * 9 * 1 * 4  # thrice, for backward; two operations a multiplication
    assert first_convolution < one < 500 * first_convolution


@pytest.mark.parametrize("index", range(3))
def test_convolutions_agree(against: Bench, index: int) -> None:
    """In each direction; and a result that is 1 % off is seen."""
    case = conv.direction_cases(against, SHAPE)[index]
    assert against.check(case) is None
    arrays = case.ours.arrays
    case.ours.arrays = lambda y: [1.01 * a for a in arrays(y)]
    assert against.check(case) is not None


def test_samplers_agree(against: Bench) -> None:
    from benchmarks import sample

    assert against.check(sample.case(against, "small", 2, steps=3, size=8)) is None


def test_autoencoders_agree(against: Bench) -> None:
    from benchmarks import autoencoder

    config = autoencoder.TRAINED | {"block_out_channels": [8, 8, 8]}
    assert against.check(autoencoder.step_case(against, 2, 16, config)) is None
    unequal = autoencoder.step_case(against, 2, 16, config)
    unequal.ours = autoencoder.step_case(against, 2, 16, config | {"norm_num_groups": 4}).ours
    assert against.check(unequal) is not None
    for case in autoencoder.whole_cases(against, 16, config):
        assert against.check(case) is None, case.name


@pytest.mark.parametrize("kind", ["CONV", "VIT"])
def test_contrastive_encoders_agree(against: Bench, kind: str) -> None:
    from benchmarks import clip

    vision = getattr(clip, kind)
    assert against.check(clip.step_case(against, kind, 3, 16, vision)) is None
    unequal = clip.step_case(against, kind, 3, 16, vision)
    unequal.ours = clip.step_case(against, kind, 3, 16, vision | {"hidden_size": 64}).ours
    assert against.check(unequal) is not None


def test_unets_that_are_told_words_agree(against: Bench) -> None:
    from benchmarks import words

    config = words.preset("small", (8, 8, 3), True, block_out_channels=[16, 16])
    assert against.check(words.step_case(against, "tiny", 3, (8, 8), config)) is None
    unequal = words.step_case(against, "tiny", 3, (8, 8), config)
    unequal.ours = words.step_case(against, "tiny", 3, (8, 8), config | {"layers_per_block": 2}).ours
    assert against.check(unequal) is not None


def test_optimisers_agree(against: Bench) -> None:
    from benchmarks import ops

    case = ops.optimizer_case(against, size=40, count=2)
    assert against.check(case) is None
    case.ours.run()  # one step ahead
    assert against.check(case) is not None


def test_ops_agree(against: Bench) -> None:
    from benchmarks import ops

    works = [ops.attention(2, 2, 9, 4)]
    works += [
        work for work in ops.works() if work.name.startswith(("GroupNorm+SiLU 128", "LayerNorm", "SiLU", "upsample + conv 64"))
    ]
    assert len(works) == 5
    for work in works:
        for case in ops.cases(against, work):
            assert against.check(case) is None, case.name


def test_twin_follows_our_recipe(against: Bench, tmp_path: Path) -> None:
    """The first steps of our trainer and of its PyTorch twin have equal losses, and its weights load as a run's model."""
    from benchmarks.quality import TwinTrainer
    from tinydiff.pipeline import Pipeline
    from tinydiff.run import Run
    from tinydiff.tasks import configure, make_task
    from tinydiff.train import Trainer

    options = {f"model.{name}": value for name, value in TINY.items()} | {"batch_size": 4}
    config = configure("denoiser", "small", options)
    ours, theirs = Trainer(make_task(config), 10), TwinTrainer(make_task(config), 10)
    for _ in range(3):
        assert theirs.advance()["loss"] == pytest.approx(ours.advance()["loss"], rel=1e-4)
    run = Run.create(tmp_path / "run", config)
    theirs.save(run)
    loaded = Pipeline.load(tmp_path / "run").model.state_dict()
    for (name, _), average in zip(ours.model.named_parameters(), ours.ema.average, strict=True):
        np.testing.assert_allclose(loaded[name].numpy(), average, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("channels", scaling.SWEEPS["channels"])
def test_the_sweep_of_channels_has_networks(channels: int) -> None:
    assert td.models.UNet2DModel.from_config(scaling.network(channels)).config["block_out_channels"] == [channels] * 3


def test_one_thread_against_all(against: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides have as many threads as the row says, and afterwards what they had before."""
    from benchmarks import train

    monkeypatch.setattr(against, "rows", [])
    seen, run = [], Bench.run

    def watched(bench: Bench, case: Case) -> dict[str, Any]:
        seen.append((td.get_num_threads(), bench.torch.get_num_threads()))
        return run(bench, case)

    monkeypatch.setattr(Bench, "run", watched)
    config, before = train.preset("small", **TINY), (against.threads, against.sgemm, against.copy)
    scaling.compare_threads(against, "tiny", config, train.make_batch(2, config, size=8))
    one, every, summary = against.rows
    assert seen == [(1, 1), (before[0], before[0])] == [(row["threads"],) * 2 for row in (one, every)]
    with against.on_threads(1):
        pass
    assert (td.get_num_threads(), against.torch.get_num_threads()) == (before[0], before[0])
    assert (against.threads, against.sgemm, against.copy) == before
    assert summary["ours_speedup"] == pytest.approx(one["ours_ms"] / every["ours_ms"])
    assert summary["theirs_speedup"] == pytest.approx(one["theirs_ms"] / every["theirs_ms"])
