"""Drawings as DOT text, and backward one step at a time, against graphs and gradients worked out by hand."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import tinydiff as td
from tinydiff.autograd import is_grad_enabled

HERE = Path(__file__).name


def leaf(*shape, seed=0, dtype="float64"):
    return td.tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True, dtype=dtype)


def boxes(graph):
    """Label by identifier."""
    found = re.findall(r'^\t(\w+) \[label=(?:"((?:[^"\\]|\\.)*)"|(\w+))', graph.source, re.MULTILINE)
    return {key: quoted or plain for key, quoted, plain in found}


def arrows(graph):
    return re.findall(r"^\t(\w+) -> (\w+)", graph.source, re.MULTILINE)


# Drawing.


def test_draw_shows_ops_leaves_and_shapes():
    x, w = leaf(2, 3, dtype="float32"), leaf(3, 4, seed=1)
    line = sys._getframe().f_lineno + 1
    h = td.ops.tanh(x.astype("float64") @ w)
    graph = td.draw((h * h).sum(), names={"weight": w, "hidden": h})
    labels = boxes(graph)
    by_label = {label.split("\n")[0]: key for key, label in labels.items()}
    assert labels[by_label["weight"]] == "weight\n(3, 4) float64\n96 B"
    assert labels[by_label["(2, 3) float32"]] == "(2, 3) float32\n24 B"
    assert labels[by_label["hidden = tanh"]] == f"hidden = tanh\n(2, 4), {HERE}:{line}\nsaves out: 64 B"
    assert labels[by_label["mul"]].endswith("saves x, y: 64 B")  # the same array twice
    assert sorted(arrows(graph)) == sorted(
        (by_label[a], by_label[b])
        for a, b in [
            ("(2, 3) float32", "astype"),
            ("astype", "matmul"),
            ("weight", "matmul"),
            ("matmul", "hidden = tanh"),
            ("hidden = tanh", "mul"),
            ("hidden = tanh", "mul"),
            ("mul", "sum"),
            ("sum", "result ()"),
        ]
    )
    assert f'{by_label["weight"]} -> {by_label["matmul"]} [label="y (3, 4)"]' in graph.source
    # beside the leaves: the cast of x that matmul saved (48 B), tanh's result (64 B)
    assert "5 ops, 2 leaves; beside the leaves it keeps 112 B" in graph.source


def test_draw_gives_the_same_text_for_the_same_program():
    def program():
        x = leaf(3)
        return td.draw((td.ops.exp(x) * x).sum()).source

    first, second = [program() for _ in range(2)]
    assert first == second


def test_draw_takes_several_results_and_draws_what_they_share_once():
    x = leaf(3)
    y = x.exp()
    graph = td.draw([y * 2, y * 3])
    labels = [label.split("\n")[0] for label in boxes(graph).values()]
    assert sorted(labels) == ["(3,) float64", "exp", "mul", "mul", "result (3,)", "result (3,)"]


def test_draw_says_what_a_checkpoint_dropped():
    y = td.checkpoint(lambda x: x.exp(), leaf(1000))
    assert "saves nothing (checkpoint)" in td.draw(y).source
    assert "saves out: 8 kB" in td.draw(leaf(1000).exp()).source


def test_draw_keeps_to_its_limit_and_says_so():
    y = leaf(1)
    for _ in range(5000):
        y = y * 1.0
    graph = td.draw(y.exp(), limit=50)
    labels = boxes(graph)
    assert sum(key.startswith("op") for key in labels) == 50
    assert labels["earlier"] == "… 4,951 earlier ops"
    assert [a for a in arrows(graph) if a[0] == "earlier"] == [("earlier", "op0")]
    assert "5,001 ops, 1 leaves" in graph.source
    assert any(label.startswith("exp\n") for label in labels.values())


def test_draw_points_once_from_what_it_left_out():
    x = leaf(2)
    assert arrows(td.draw(x.sin() * x.cos(), limit=1)) == [("earlier", "op0"), ("op0", "result0")]


def test_draw_escapes_names():
    x = leaf(2)
    source = td.draw(x.exp(), names={'<b>"a\\n"': x}).source
    assert r"<b>\"a\\n\"" in source


def test_draw_refuses_what_it_cannot_draw():
    x = leaf(2)
    y = x.exp().sum()
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        td.draw(y)
    with pytest.raises(ValueError, match="no op was recorded"):
        td.draw(x)
    with pytest.raises(TypeError, match="tensors, not float"):
        td.draw([1.0])
    with pytest.raises(ValueError, match="at least 1 op, not 0"):
        td.draw(x.exp(), limit=0)


# Stepping.


def test_steps_go_backward_one_node_at_a_time():
    x, w = leaf(2, 3), leaf(3, seed=1)
    line = sys._getframe().f_lineno + 1
    y = td.ops.exp(x)
    loss = (y * w).sum()
    found = list(td.steps(loss, 2.0))
    assert [step.op for step in found] == ["sum", "mul", "exp"]
    assert [step.number for step in found] == [1, 2, 3]
    last, product = found[2], found[1]
    ex = np.exp(x.numpy())
    np.testing.assert_array_equal(found[0].gradients["x"].numpy(), np.full((2, 3), 2.0))
    np.testing.assert_allclose(product.gradients["x"].numpy(), np.broadcast_to(2 * w.numpy(), (2, 3)))
    np.testing.assert_allclose(product.gradients["y"].numpy(), 2 * ex.sum(axis=0))  # summed back to w's shape
    assert product.saved == {"x": (2, 3), "y": (3,)}
    np.testing.assert_allclose(last.gradient.numpy(), np.broadcast_to(2 * w.numpy(), (2, 3)))
    np.testing.assert_allclose(last.gradients["x"].numpy(), 2 * w.numpy() * ex)
    assert last.line == f"{Path(__file__)}:{line}" and last.saved == {"out": (2, 3)}
    np.testing.assert_allclose(x.grad.numpy(), 2 * w.numpy() * ex)
    np.testing.assert_allclose(w.grad.numpy(), 2 * ex.sum(axis=0))


def test_steps_bring_a_sum_only_when_it_is_complete():
    x = leaf(3)
    y = x.sin()
    found = {step.op: step for step in td.steps((y * 2 + y.exp()).sum())}
    np.testing.assert_allclose(found["sin"].gradient.numpy(), 2 + np.exp(np.sin(x.numpy())))


def test_steps_leave_grad_alone_until_the_last():
    x = leaf(3)
    y = (x * x).sum()
    walk = td.steps(y)
    next(walk)
    assert x.grad is None
    list(walk)
    np.testing.assert_allclose(x.grad.numpy(), 2 * x.numpy())
    list(td.steps(y))  # the graph is kept, and gradients add up as in backward
    np.testing.assert_allclose(x.grad.numpy(), 4 * x.numpy())


def test_steps_do_not_touch_how_the_readers_own_code_records():
    x = leaf(3)
    for step in td.steps((x * x.exp()).sum()):
        assert is_grad_enabled()
        assert (x * 2).node is not None
        assert all(gradient.node is None for gradient in step.gradients.values())
    with td.profile() as profile:
        for _ in td.steps(x.exp().sum()):
            td.ops.tanh(x)
    assert {row.phase for row in profile.rows if row.op == "tanh"} == {"forward"}


def test_steps_refuse_at_once_what_backward_refuses():
    with pytest.raises(RuntimeError, match="shape"):
        td.steps(leaf(3).exp())
    with pytest.raises(RuntimeError, match="requires_grad"):
        td.steps(td.tensor(1.0))


def test_a_step_reads_well():
    x, w = td.tensor([1.0, 2.0], requires_grad=True), td.tensor(np.ones((2, 20)), requires_grad=True, dtype="float32")
    line = sys._getframe().f_lineno + 1
    y = x @ w
    (step,) = td.steps(y, np.ones(20))
    assert repr(step).splitlines() == [
        f"step 1: matmul, called at {HERE}:{line}",
        "  ∂ result  (20,) of norm 4.472",
        "  → ∂ x     (2,) [20., 20.]",
        "  → ∂ y     (2, 20) of norm 10",
        "  from saved x (2,), y (2, 20)",
    ]
