"""The profiler, the finder of the first non-finite value and the memory meter, against counts made by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import tinydiff as td
from tinydiff.autograd import STATE
from tinydiff.backend import Array
from tinydiff.op import OBSERVERS, REGISTRY, Call
from tinydiff.tensor import Tensor

HERE = Path(__file__).name


def leaf(*shape, dtype="float64", seed=0):
    return td.tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True, dtype=dtype)


def rows_of(profile):
    return {(row.op, row.phase, row.who): row for row in profile.rows}


@pytest.fixture
def twice():
    """An op with a kernel for four elements and more, forward and backward."""

    @td.op(name="twice", flops=lambda out, x: 3 * out.size)
    def twice(xp, x: Array):
        return x + x

    @twice.vjp
    def _(g):
        return g + g

    @twice.kernel("numpy", above=4)
    def _(x):
        return 2 * x

    @twice.kernel_backward("numpy")
    def _(g):
        return 2 * g

    yield twice
    del REGISTRY["twice"]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert OBSERVERS == [] and STATE.node is None


# The profiler.


def test_profile_tells_forward_from_backward():
    x, w = leaf(3), leaf(3, seed=1)
    with td.profile() as profile:
        (td.ops.exp(x) * w).sum().backward()
    rows = rows_of(profile)
    assert rows["exp", "forward", "definition"].calls == 1
    assert rows["mul", "forward", "definition"].calls == 1
    assert rows["mul", "backward", "definition"].calls == 3  # two for the product, one for exp
    assert not any(op == "exp" and phase == "backward" for op, phase, _ in rows)


def test_profile_counts_the_sum_of_gradients_as_backward():
    x = leaf(3)
    with td.profile() as profile:
        (td.ops.sin(x) * td.ops.cos(x)).sum().backward()
    assert ("add", "forward", "definition") not in rows_of(profile)
    assert rows_of(profile)["add", "backward", "definition"].calls == 1


def test_profile_counts_the_second_run_of_a_checkpoint_apart():
    x = leaf(3)
    with td.profile() as profile:
        td.checkpoint(lambda x: td.ops.exp(td.ops.sin(x)), x).sum().backward()
    rows = rows_of(profile)
    assert rows["exp", "forward", "definition"].calls == rows["exp", "recompute", "definition"].calls == 1
    assert rows["cos", "backward", "definition"].calls == 1


def test_profile_calls_a_composition_run_for_its_derivative_backward():
    x = leaf(2, 3)
    with td.profile() as profile:
        y = td.ops.layer_norm(x)
    forward = {key: row.calls for key, row in rows_of(profile).items()}
    with td.profile() as profile:
        y.backward(np.ones((2, 3)))
    assert forward and {phase for _, phase, _ in forward} == {"forward"}
    assert {row.phase for row in profile.rows} == {"backward"}


def test_profile_counts_flops_and_bytes():
    x, y = leaf(4, 5), leaf(5, 6)
    with td.profile() as profile:
        x @ y
    (row,) = profile.rows
    assert (row.op, row.flops, row.bytes) == ("matmul", 2 * 4 * 5 * 6, 8 * (4 * 5 + 5 * 6 + 4 * 6))
    assert row.gflops_per_second == pytest.approx(row.flops / row.seconds / 1e9)
    assert row.gbytes_per_second == pytest.approx(row.bytes / row.seconds / 1e9)
    assert 0 < row.seconds < profile.elapsed


def test_profile_counts_memory_once_and_views_not_at_all():
    x = leaf(4, 6)
    with td.profile() as profile:
        x.reshape(24)
        wide = x[0].expand(1000, 6)
        x * x
        td.ops.neg(wide)
    rows = rows_of(profile)
    assert [rows[name, "forward", "definition"].bytes for name in ("reshape", "getitem", "broadcast_to")] == [0, 0, 0]
    assert [rows[name, "forward", "definition"].flops for name in ("reshape", "getitem", "broadcast_to")] == [0, 0, 0]
    assert rows["mul", "forward", "definition"].bytes == 8 * 2 * 24
    assert rows["neg", "forward", "definition"].bytes == 8 * (6 + 6000)


def test_profile_says_who_ran(twice):
    small, large = leaf(3), leaf(5)
    with td.profile() as profile:
        twice(small).sum().backward()
        twice(large).sum().backward()
        twice(large).sum().backward()
    rows = rows_of(profile)
    assert rows["twice", "forward", "definition"].calls == 1
    assert rows["twice", "forward", "numpy"].calls == 2
    assert rows["twice", "backward", "numpy"].calls == 2
    assert rows["twice", "forward", "numpy"].flops == 2 * 3 * 5
    assert rows["twice", "backward", "numpy"].flops == 2 * 2 * 3 * 5
    assert rows["add", "backward", "definition"].calls == 1  # the rule, where the kernel declined


def test_profile_prints_a_table(twice):
    with td.profile() as profile:
        twice(leaf(5)).exp()
    lines = str(profile).splitlines()
    assert any("twice" in line and "numpy kernel" in line and "forward" in line for line in lines)
    assert any("exp" in line and "definition" in line for line in lines)
    assert any("outside ops" in line for line in lines)


def test_profile_prints_the_speed_of_all_ops():
    x, y = leaf(100, 200), leaf(200, 300)
    with td.profile() as profile:
        (x @ y).exp()
    (line,) = (line for line in str(profile).splitlines() if "all ops" in line)
    seconds = sum(row.seconds for row in profile.rows)
    flops, sizes = 2 * 100 * 200 * 300 + 100 * 300, (100 * 200, 200 * 300, 3 * 100 * 300)
    calls, *_, gflops, gbytes = line.strip("│ ").split("│")[3:]
    assert int(calls) == 2
    assert float(gflops) == pytest.approx(flops / seconds / 1e9, abs=0.06)
    assert float(gbytes) == pytest.approx(8 * sum(sizes) / seconds / 1e9, abs=0.06)


def test_profile_stops_after_the_block_even_by_an_error():
    x = leaf(3)
    with pytest.raises(ValueError, match="broadcast"), td.profile() as profile:
        x + leaf(4)
    x.exp()
    assert profile.rows == [] and profile.elapsed > 0


# The first value that is not finite.


def test_first_nonfinite_names_the_forward_op_and_its_line():
    x = td.tensor([0.0, 1.0, 4.0], requires_grad=True)
    with pytest.raises(FloatingPointError) as error, td.first_nonfinite():
        y = x * 2
        line = sys._getframe().f_lineno + 1
        z = y.log()
        z.exp()
    message = str(error.value)
    assert message.startswith("first inf: log (forward, called at ")
    assert f"{HERE}:{line})" in message
    assert "gave 1 of 3 values" in message and "x (3,) float32 in [0, 8]" in message


def test_first_nonfinite_names_the_line_without_a_tape_too():
    line = sys._getframe().f_lineno + 2
    with pytest.raises(FloatingPointError, match=f"{HERE}:{line}"), td.no_grad(), td.first_nonfinite():
        td.ops.log(td.tensor([-1.0]))


def test_first_nonfinite_names_the_backward_and_the_line_of_its_forward():
    x = td.tensor([0.0, 1.0], requires_grad=True)
    with pytest.raises(FloatingPointError) as error, td.first_nonfinite(), np.errstate(divide="ignore"):
        line = sys._getframe().f_lineno + 1
        y = x.sqrt()
        y.sum().backward()
    assert f"div in the backward of sqrt (called at {Path(__file__)}:{line}) gave 1 of 2" in str(error.value)


def test_first_nonfinite_names_the_fused_op_whose_composition_ran_backward():
    @td.fused(name="root")
    def root(x: Tensor):
        return td.ops.sqrt(td.ops.mul(x, 1.0))

    @root.kernel("numpy")
    def _(x):
        return np.sqrt(x)

    del REGISTRY["root"]
    x = td.tensor([0.0, 1.0], requires_grad=True)
    line = sys._getframe().f_lineno + 1
    y = root(x)
    message = f"div in the backward of root .*{HERE}:{line}"
    with pytest.raises(FloatingPointError, match=message), td.first_nonfinite(), np.errstate(divide="ignore"):
        y.backward(np.ones(2))


def test_first_nonfinite_sees_a_sum_of_gradients_overflow():
    x = td.tensor([1.0], requires_grad=True)
    y = td.ops.concat([x * 3e38, x * 3e38])
    message = "first inf: add in the backward of mul"
    with pytest.raises(FloatingPointError, match=message), td.first_nonfinite(), np.errstate(over="ignore"):
        y.backward(np.ones(2))


def test_first_nonfinite_sees_every_gradient_of_a_backward_kernel(twice, monkeypatch):
    good, bad = np.zeros(2), np.array([0.0, np.nan])
    x = leaf(2)
    with pytest.raises(FloatingPointError, match=r"the backward of twice .* gave 1 of 2"), td.first_nonfinite():
        y = twice(x)
        monkeypatch.setattr(STATE, "node", y.node)
        OBSERVERS[0](Call(twice.op, "numpy backward", [good, good], (None, good, bad), {}, 0.0, y.node))


def test_first_nonfinite_says_when_nan_came_in():
    data = td.tensor([[1.0, np.nan], [2.0, 3.0]])
    with (
        pytest.raises(FloatingPointError, match=r"first nan: matmul .*nan came in with x; inputs: x \(2, 2\)"),
        td.first_nonfinite(),
    ):
        data @ leaf(2, 2, dtype="float32")


def test_first_nonfinite_lets_a_mask_pass_and_catches_what_it_breaks():
    scores = leaf(2, 3, dtype="float32")
    mask = np.array([[True, False, True], [True, True, False]])
    with td.first_nonfinite():
        td.ops.softmax(td.ops.where(mask, scores, -np.inf), axis=-1).sum().backward()
    mask[1] = False
    with pytest.raises(FloatingPointError, match="first nan: softmax"), td.first_nonfinite(), np.errstate(invalid="ignore"):
        td.ops.softmax(td.ops.where(mask, scores, -np.inf), axis=-1)


def test_first_nonfinite_can_report_and_go_on():
    with td.first_nonfinite(raises=False) as found:
        assert td.ops.exp(td.tensor([1.0])).item() == pytest.approx(np.e)
        assert found.message is None
        with np.errstate(invalid="ignore"):
            y = td.ops.log(td.tensor([0.0])) * 0.0
    assert np.isnan(y.item())
    assert found.message.startswith("first inf: log (forward")


def test_finite_work_passes_first_nonfinite():
    x = leaf(2, 4)
    with td.first_nonfinite() as found:
        td.ops.layer_norm(td.ops.gelu(x)).sum().backward()
        td.ops.argmax(x)
    assert found.message is None


def test_after_an_error_in_backward_forward_is_forward_again():
    x = td.tensor([0.0], requires_grad=True)
    with td.profile() as profile:
        with pytest.raises(FloatingPointError), td.first_nonfinite(), np.errstate(divide="ignore"):
            x.sqrt().sum().backward()
        td.ops.tanh(x)
    assert ("tanh", "forward", "definition") in rows_of(profile)


# Memory.

SIZE = 8 * 1000


def chain(x):
    for _ in range(10):
        x = td.ops.exp(td.ops.mul(x, 0.1))
    return x


def test_peak_memory_counts_three_results_of_a_chain_that_is_not_recorded():
    x = leaf(1000).detach()
    with td.peak_memory() as memory:
        y = chain(x)
        assert memory.live == SIZE
        del y
        assert memory.live == 0
    assert memory.peak == 3 * SIZE  # the loop's x, the product and its exponential


def test_peak_memory_counts_what_the_tape_keeps_and_a_checkpoint_keeps_less():
    x = leaf(1000)
    with td.peak_memory() as kept:
        y = chain(x)
        assert kept.live == 10 * SIZE  # what each exp gave; mul by a number saves none of its own
    with td.peak_memory() as dropped:
        z = td.checkpoint(chain, x)
        assert dropped.live == SIZE
    assert dropped.peak < kept.peak
    assert np.array_equal(y.numpy(), z.numpy())


def test_peak_memory_counts_memory_not_views():
    x = leaf(1000).detach()
    with td.peak_memory() as memory:
        x.reshape(10, 100).expand(50, 10, 100)
        assert memory.peak == 0
        y = x * 2
        views = [y.reshape(10, 100), y[3:]]
        assert memory.live == memory.peak == SIZE
        del y
        assert memory.live == SIZE  # the views hold it
        del views
        assert memory.live == 0
