"""What the tape itself costs: long chains of tiny ops, and a network so small that Python dominates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side
from benchmarks.memory import resident, return_freed
from benchmarks.train import make_batch, preset, step_case

LENGTH = 10_000  # ops in the chain
NODES = 50_000  # of which the memory is measured


def chain(x: Any, sin: Callable[[Any], Any], factor: Any, shift: Any, length: int) -> Any:
    """`length` ops, a third each of multiplications, additions and sines. The factor keeps values from dying out."""
    for _ in range(length // 3):
        x = x * factor
        x = x + shift
        x = sin(x)
    return x


def cases(bench: Bench, length: int) -> list[Case]:
    """Forward and backward of the chain, with Python numbers and with tensors as its constants."""
    start, seed = np.linspace(0.1, 1, 4, dtype=np.float32), np.ones(4, np.float32)
    torch = bench.torch

    def ours(constant: Callable[[float], Any]) -> Side:
        x, factor, shift, grad = td.tensor(start, requires_grad=True), constant(1.1), constant(0.3), td.tensor(seed)

        def run() -> Any:
            x.grad = None
            y = chain(x, td.ops.sin, factor, shift, length)
            y.backward(grad)
            return y

        return Side(run, lambda y: [y.numpy(), x.grad.numpy()])  # type: ignore[union-attr]

    def theirs(constant: Callable[[float], Any]) -> Side:
        x, factor, shift = torch.tensor(start, requires_grad=True), constant(1.1), constant(0.3)
        grad = torch.from_numpy(seed)

        def run() -> Any:
            x.grad = None
            y = chain(x, torch.sin, factor, shift, length)
            y.backward(grad)
            return y

        return Side(run, lambda y: [y.detach().numpy(), x.grad.numpy()])

    made = []
    for name, number in (("numbers", True), ("tensors", False)):
        opponent = {"torch": theirs(float if number else torch.tensor)} if torch else {}
        mine = ours(float if number else lambda value: td.tensor(np.float32(value)))
        extra = {"ops": length // 3 * 3}
        made.append(Case("overhead", f"{length:,} tiny ops with {name}", mine, opponent, target=1.0, extra=extra))
    return made


def bytes_per_node(start: Any, sin: Callable[[Any], Any]) -> float:
    """Memory of one link of the chain, its value included, while the graph is alive."""
    chain(start, sin, 1.1, 0.3, 300)
    return_freed()
    before = resident()
    kept = chain(start, sin, 1.1, 0.3, NODES)
    grown = resident() - before
    del kept
    return grown / NODES


def run(bench: Bench) -> None:
    """The suite: chains, memory of a node, and the training step of a network where Python dominates."""
    for case in cases(bench, LENGTH // 10 if bench.settings.quick else LENGTH):
        row = bench.run(case)
        if row["ours_ms"]:
            micros = {side: 1000 * row[f"{side}_ms"] / row["ops"] for side in ("ours", "theirs") if row[f"{side}_ms"]}
            row["us_per_op"] = micros["ours"]
            row["remark"] = ", ".join(f"{side} {value:.2f} µs an op" for side, value in micros.items())
    start = np.linspace(0.1, 1, 4, dtype=np.float32)
    memory = {"ours_bytes": bytes_per_node(td.tensor(start, requires_grad=True), td.ops.sin)}
    row = {"suite": "overhead", "case": "memory of a node", "remark": f"{memory['ours_bytes']:.0f} bytes"}
    if bench.torch:
        memory["theirs_bytes"] = bytes_per_node(bench.torch.tensor(start, requires_grad=True), bench.torch.sin)
        row |= {"ratio": memory["theirs_bytes"] / max(memory["ours_bytes"], 1), "variant": "torch"}
        row["remark"] += f"; theirs {memory['theirs_bytes']:.0f}"
    bench.add(row | memory)

    config = preset("small", block_out_channels=[8, 8, 8], attention_head_dim=8, norm_num_groups=4)
    case = step_case(bench, "training step, batch 1, 8 channels", config, make_batch(1, config), target=1.0)
    case.suite = "overhead"
    bench.run(case)
