"""The benchmarks of a GPU without one: what they count, how they time, that they check, and that they claim no time."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import conv, cuda_conv, gpu, harness
from benchmarks.harness import Bench, Case, Settings, Side
from tinydiff.kernels import convrule

A100, T4 = gpu.CARDS["a100"], gpu.CARDS["t4"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
no_gpu = pytest.mark.skipif(gpu.missing("cuda") is None, reason="there is a GPU")


# Counting.


def test_roofline() -> None:
    assert gpu.roofline(A100, "float32", 19.5e12, 1e9) == (1.0, "compute")
    assert gpu.roofline(A100, "float32", 19.5e9, 2 * 2039e9) == (2.0, "memory")
    assert gpu.roofline(A100, "tf32", 19.5e12, 0) == (pytest.approx(0.125), "compute")
    assert gpu.roofline(T4, "tf32", 1.0, 1.0) is None


@pytest.mark.parametrize("shape", [conv.Shape(2, 7, 6, 3, 4, 3, 2, 1), conv.Shape(1, 5, 9, 8, 2, 1, 1, 0)], ids=str)
def test_work_is_counted_as_the_arrays_are(shape: conv.Shape) -> None:
    x, w, gy = conv.arrays(shape)
    for version in ("direct", "igemm_tc"):
        done = cuda_conv.work(version, "forward", shape, scratch=100.0)
        assert done.bytes == x.nbytes + w.nbytes + gy.nbytes + 200
        assert done.flops == 2 * gy.size * w[..., 0].size


@needs_compiler
@pytest.mark.parametrize("direction", ["forward", "input_grad"])
def test_winograds_work_follows_from_its_workspace(built: Path, direction: str) -> None:
    """The launcher asks for 16 floats for each weight and for each square's channels in and out."""
    from tinydiff.kernels import cuda

    shape = conv.Shape(2, 7, 6, 5, 9, 3, 1, 0)  # 5 × 4 results, 7 × 6 pixels: squares hang over the edge
    scratch = cuda_conv.workspace(cuda.extension("cudasim"), "wino_f2", direction, "float32", shape)
    squares = (scratch / 64 - 5 * 9) / (5 + 9)
    assert squares == {"forward": 2 * 3 * 2, "input_grad": 2 * 4 * 3}[direction]
    done = cuda_conv.work("wino_f2", direction, shape, scratch)
    assert done.flops == 2 * 16 * squares * 5 * 9
    assert done.bytes == cuda_conv.traffic(shape) + 2 * scratch


def test_contenders() -> None:
    found = list(cuda_conv.contenders(conv.Shape(1, 8, 8, 8, 8, 3)))
    assert {version for _, version, _ in found} == set(convrule.VERSIONS) - {"small_c"}
    assert {precision for _, version, precision in found if version == "igemm_tc"} == {"tf32", "bf16"}
    assert ("weight_grad", "wino_f2", "float32") not in found
    old = list(cuda_conv.contenders(conv.Shape(1, 8, 8, 8, 8, 3), (7, 5)))
    assert {version for _, version, _ in old} == {"direct", "igemm_simt", "igemm_simt_64", "wino_f2"}
    simulated = [c for shape in cuda_conv.SIMULATED for c in cuda_conv.contenders(shape)]
    assert {version for _, version, _ in simulated} == set(convrule.VERSIONS)


# Timing.


def test_median_and_spread() -> None:
    times = gpu.Times([4.0, 1.0, 2.0, 3.0, 100.0], [2.0, 1.0, 9.0])
    assert (times.seconds, times.warm_seconds) == (3.0, 2.0)
    assert times.spread == pytest.approx((4 - 2) / 3)
    assert gpu.Times([1.0], [1.0]).spread == 0


class FakeGPU:
    """What a stopwatch asks of CuPy. Its clock is moved by what runs; `log` is what happened."""

    def __init__(self) -> None:
        self.clock, self.log = 0.0, []  # type: ignore[var-annotated]
        fake = self

        class Event:
            def record(self) -> None:
                self.at = fake.clock
                fake.log.append("event")

            def synchronize(self) -> None:
                fake.log.append("wait")

        class Dirt:
            def __iadd__(self, other: int) -> Dirt:
                fake.run("flush", 0.5)
                return self

        self.cuda = SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda begin, end: 1000 * (end.at - begin.at),
            Device=lambda: SimpleNamespace(attributes={"L2CacheSize": 40 << 20}),
        )
        self.zeros = lambda count, dtype: Dirt()

    def run(self, name: str, seconds: float) -> None:
        self.clock += seconds
        self.log.append(name)


def test_a_stopwatch_empties_the_cache_and_takes_turns() -> None:
    fake = FakeGPU()
    watch = gpu.Stopwatch(fake)
    assert watch.cache == 160 << 20
    assert watch.once(lambda: fake.run("a", 0.25), 2) == pytest.approx(0.25)
    assert fake.log == ["flush", "flush", "event", "a", "a", "event", "wait"]
    fake.log.clear()
    slow, fast = (lambda: fake.run("slow", 1.0)), (lambda: fake.run("fast", 0.001))
    times = watch.measure({"slow": slow, "fast": fast}, 4)
    assert times["slow"].cold == pytest.approx([1.0] * 4) and times["fast"].warm == pytest.approx([0.001] * 4)
    done = [name for name in fake.log if name in ("slow", "fast")]
    warmup = ["slow"] * 3 + ["fast"] * 3
    assert done == warmup + (["slow"] * 3 + ["fast"] * 11) * 4  # one cold call, then 2, or the 10 that fill 10 ms


def session_of(rates: gpu.Rates | None = None) -> cuda_conv.Session:
    session = cuda_conv.Session.__new__(cuda_conv.Session)
    session.rates = rates
    return session


def test_what_follows_from_times() -> None:
    rates = gpu.Rates(copy=1000.0, matrix={"float32": 2000.0})
    row: dict[str, Any] = {"flops": 4e9, "bytes": 2e8, "precision": "float32", "theirs_ms": None, "ratio": None}
    times = {"ours": gpu.Times([0.004, 0.004], [0.002]), "theirs": gpu.Times([0.003], [0.001])}
    session_of(rates).record(row, times)
    assert row["kind"] == "measured" and row["ours_ms"] == pytest.approx(4) and row["ours_warm_ms"] == pytest.approx(2)
    assert row["theirs_ms"] == pytest.approx(3) and row["ratio"] == pytest.approx(0.75) and row["spread"] == 0
    assert row["gflops"] == pytest.approx(1000) and row["share_of_matrix"] == pytest.approx(0.5)
    assert row["gbs"] == pytest.approx(50) and row["share_of_copy"] == pytest.approx(0.05)
    row |= {"precision": "bf16", "ratio": None}
    session_of(rates).record(row, {"ours": times["ours"]})
    assert row["share_of_matrix"] is None and row["ratio"] is None  # that rate was not measured


# On the simulated GPU: the same path, checked, and no times.


@needs_compiler
def test_every_version_is_checked_and_none_is_timed(built: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command.main, ["conv", "--device", "cudasim", "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    rows = harness.read(tmp_path / "rows.json")
    assert {row["version"] for row in rows} == set(convrule.VERSIONS)
    for row in rows:
        assert row["kind"] == "simulated" and row["wrong"] is None and 0 < row["error"] <= row["tolerance"]
        assert row["ours_ms"] is row["theirs_ms"] is row["ratio"] is None
        assert row["model_ms"] == pytest.approx(
            1000 * max(row["flops"] / (A100.tflops[row["precision"]] * 1e12), row["bytes"] / (A100.bandwidth * 1e9))
        )
    assert "simulated: its time means nothing" in " ".join(result.output.split())


@needs_compiler
def test_a_wrong_result_is_called_wrong_and_not_timed(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, shape = cuda_conv.Session("cudasim", A100), cuda_conv.SIMULATED[0]
    measured = []
    session.watch = SimpleNamespace(
        measure=lambda sides, repeat: measured.append(list(sides)) or {name: gpu.Times([1.0], [1.0]) for name in sides}
    )
    answer = cuda_conv.reference("forward", shape)
    row = session.row("forward", "igemm_simt", "float32", shape, answer)
    assert row["kind"] == "measured" and row["ours_ms"] == 1000 and measured == [["ours"]]
    ours = cuda_conv.ours
    monkeypatch.setattr(cuda_conv, "ours", lambda *arguments: lambda: ours(*arguments)() * 1.01)
    row = session.row("forward", "igemm_simt", "float32", shape, answer)
    assert "differs by 1.0e-02" in row["wrong"] and row["ours_ms"] is None and row["kind"] != "measured" and len(measured) == 1
    session.rows = [row]
    out = io.StringIO()
    Console(file=out, width=250).print(cuda_conv.table(session))
    assert "wrong: differs" in out.getvalue()


@needs_compiler
@pytest.mark.parametrize("suite", ["train", "sample"])
def test_whole_runs_are_checked_on_the_simulated_gpu(built: Path, tmp_path: Path, suite: str) -> None:
    result = CliRunner().invoke(command.main, [suite, "--device", "cudasim", "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["kind"] == "simulated" and row["wrong"] is None and row["ours_ms"] is None
    assert "checked, not timed" in row["remark"]


def test_a_wrong_step_on_a_device_is_seen() -> None:
    bench = Bench(Settings(quick=True, device="cudasim"), Console(file=io.StringIO()))
    assert math.isnan(bench.sgemm)
    right, wrong = (Side(lambda v=v: np.full(3, v)) for v in (1.0, 1.1))  # type: ignore[misc]
    assert bench.run(Case("s", "c", right, reference=right))["wrong"] is None
    assert "(on the CPU)" in bench.run(Case("s", "c", wrong, reference=right))["wrong"]
    assert [row["ours_ms"] for row in bench.rows] == [None, None]


# Without a GPU.


@no_gpu
def test_without_a_gpu_every_time_is_not_measured(tmp_path: Path) -> None:
    arguments = ["conv", "--device", "cuda", "--shape", "64,14,14,128,128,3,1,1", "--card", "h100"]
    result = CliRunner().invoke(command.main, [*arguments, "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    rows = harness.read(tmp_path / "rows.json")
    assert len(rows) > 20 and {row["direction"] for row in rows} == set(convrule.DIRECTIONS)
    for row in rows:
        assert row["kind"] == "not measured" and row["ours_ms"] is row["error"] is row["ratio"] is None and row["reason"]
        assert row["model_ms"] > 0 and row["model_card"] == "H100 SXM"
    flat = " ".join(result.output.split())
    assert "every time: not measured" in flat and "nobody measured it" in flat and result.output.count("not measured") > len(rows)


@no_gpu
def test_without_a_gpu_nothing_is_run() -> None:
    bench = Bench(Settings(quick=True, device="cuda", card="t4"), Console(file=io.StringIO()))
    row = bench.run(Case("s", "c", Side(lambda: pytest.fail("it ran")), flops=8.1e12))
    assert row["ours_ms"] is row["wrong"] is None and row["kind"] == "not measured"
    assert "model: 1e+03 ms or more on a Tesla T4" in row["remark"]


@no_gpu
@pytest.mark.parametrize("suite", ["train", "sample"])
def test_without_a_gpu_whole_runs_are_models(suite: str) -> None:
    result = CliRunner().invoke(command.main, [suite, "--device", "cuda", "--quick"])
    assert result.exit_code == 0, result.output
    assert result.output.count("not measured; model:") == 2


def test_kernels_for_the_cpu_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    result = CliRunner().invoke(command.main, ["conv", "--device", "cuda", "--kernel", str(tmp_path / "mine.py")])
    assert result.exit_code == 2 and "--kernel takes kernels for the CPU" in result.output
