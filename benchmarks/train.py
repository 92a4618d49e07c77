"""One whole training step (forward, loss, backward, clipping, AdamW, moving average) of the same UNet, and its peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Row, Side, count_work
from tinydiff.optim import EMA, AdamW, clip_scale, grad_norm
from tinydiff.tasks.denoiser import DenoiserTask

if TYPE_CHECKING:
    from tinydiff.hooks import Profile

LR, BETAS, DECAY, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.99), 0.999, 0.01, 1.0
CLASSES = 10
TINY: dict[str, Any] = {  # what a simulator can train
    "block_out_channels": [4, 4],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
Batch = dict[str, np.ndarray]
Step = Callable[[], float]


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """The network that `tinydiff train denoiser --preset NAME` builds for 28×28 digits."""
    digits = {"in_channels": 1, "out_channels": 1, "num_class_embeds": CLASSES + 1}
    return digits | DenoiserTask.PRESETS[name]["model"] | changes


def make_batch(n: int, config: dict[str, Any], size: int = 28) -> Batch:
    """A random training batch: what the time of a step depends on is its shapes."""
    rng = np.random.default_rng(0)
    shape = (n, size, size, config["in_channels"])
    return {
        "x": rng.standard_normal(shape, np.float32),
        "t": rng.integers(0, 1000, n).astype(np.float32),
        "labels": rng.integers(0, CLASSES + 1, n),
        "target": rng.standard_normal(shape, np.float32),
    }


def build(config: dict[str, Any]) -> td.models.UNet2DModel:
    """Our network, the same for the same config."""
    td.manual_seed(0)
    return td.models.UNet2DModel.from_config(config)


def our_updates(parameters: list[td.nn.Parameter]) -> Callable[[td.Tensor], float]:
    """A function that changes the parameters by the gradient of a loss, as training does, and returns the loss."""
    optimizer, ema = AdamW(parameters, LR, BETAS, weight_decay=WEIGHT_DECAY), EMA(parameters, DECAY)

    def update(loss: td.Tensor) -> float:
        loss.backward()
        optimizer.step(LR, ema, clip_scale(grad_norm(parameters), MAX_NORM))
        optimizer.zero_grad()
        return loss.item()  # type: ignore[return-value]

    return update


def torch_updates(parameters: list[Any]) -> Callable[[Any], float]:
    """The same in PyTorch, with its fused AdamW and its multi-tensor clipping and averaging."""
    import torch

    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    updates = 0

    def update(loss: Any) -> float:
        nonlocal updates
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        updates += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (1 + updates) / (10 + updates)))
        optimizer.zero_grad()
        return loss.item()

    return update


def our_step(config: dict[str, Any], batch: Batch, checkpointing: bool = False, device: str = "cpu") -> Step:
    """A function that trains ours for one step and returns the loss (and so waits for a GPU)."""
    model = build(config).to(device)
    model.gradient_checkpointing = checkpointing
    update = our_updates(model.parameters())
    x, target = td.from_numpy(batch["x"]).to(device), td.from_numpy(batch["target"]).to(device)
    return lambda: update(td.ops.mse_loss(model(x, batch["t"], batch["labels"]), target))


def torch_step(config: dict[str, Any], batch: Batch, memory_format: str = "contiguous", device: str = "cpu") -> Step:
    """The same in PyTorch, in float32 without TF32 (its products' default; its convolutions are told)."""
    import torch

    from benchmarks.twin import channels_first, twin

    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[memory_format]
    torch.backends.cudnn.allow_tf32 = False
    model = twin(build(config)).to(device, memory_format=layout)
    x, target = (channels_first(batch[name]).to(device, memory_format=layout) for name in ("x", "target"))
    t, labels = torch.from_numpy(batch["t"]).to(device), torch.from_numpy(batch["labels"]).to(device)
    update = torch_updates(list(model.parameters()))
    return lambda: update(torch.nn.functional.mse_loss(model(x, t, labels), target))


def step_case(bench: Bench, name: str, config: dict[str, Any], batch: Batch, target: float | None) -> Case:
    """A training step as a case. The check compares the losses of three steps, so it sees gradients and updates too."""

    def side(make: Callable[[], Step]) -> Side:
        step = cache(make)  # made when it is first run: where there is no GPU it can't be
        return Side(lambda: step()(), lambda loss: [np.array([loss, step()(), step()()])])

    theirs, device = {}, bench.settings.device
    if bench.torch:
        for layout in ("contiguous", "channels_last"):
            theirs[layout] = side(partial(torch_step, config, batch, layout, device))
    ours, flops = side(partial(our_step, config, batch, device=device)), training_flops(config, batch)
    case = Case("train", name, ours, theirs, target, flops, counted=True, tolerance=1e-3)
    if device != "cpu":
        case.reference = side(partial(our_step, config, batch))
    return case


def training_flops(config: dict[str, Any], batch: Batch) -> float:
    """Floating-point operations of a step, as our ops declare them, forward and backward; known before any step is run."""
    model, first = build(config), (td.from_numpy(batch["x"][:1]), batch["t"][:1], batch["labels"][:1])
    with td.no_grad():
        one, _ = count_work(lambda: model(*first))
    return 3 * one * len(batch["x"])  # backward does the same again for each of a product's two factors


def profile(name: str, n: int) -> Profile:
    """Where the time of a step goes, after one that compiled what it needs."""
    from tinydiff.hooks import profile

    config = preset(name)
    step = our_step(config, make_batch(n, config))
    step()
    with profile() as found:
        step()
    return found


def run(bench: Bench) -> None:
    """The suite: both presets, batches of 64 and 128; then peak memory. On the simulated GPU one tiny network is checked."""
    if bench.settings.device == "cudasim":
        config = preset("small", **TINY)
        bench.run(step_case(bench, "tiny, batch 2", config, make_batch(2, config, 8), target=None))
        return
    sizes = [64] if bench.settings.quick else [64, 128]
    for name in ("small", "base"):
        for n in sizes:
            config = preset(name)
            bench.run(step_case(bench, f"{name}, batch {n}", config, make_batch(n, config), target=2.0))
    for name in ("small", "base") if bench.settings.device == "cpu" else ():
        for n in sizes:
            memory(bench, name, n)


def memory(bench: Bench, name: str, n: int) -> Row:
    """Add the row of a step's peak memory above the baseline, each side in a process of its own."""
    ours = _peak_of("ours", name, n, bench.threads)
    row: Row = {"suite": "train", "case": f"{name}, batch {n}: peak memory", "target": 1.5, "ours_mb": ours}
    row["ours_checkpointed_mb"] = _peak_of("checkpointed", name, n, bench.threads)
    row["remark"] = f"{ours:.0f} MB, {row['ours_checkpointed_mb']:.0f} checkpointed"
    if bench.torch:
        theirs = {kind: _peak_of(kind, name, n, bench.threads) for kind in ("contiguous", "channels_last")}
        row["variant"] = min(theirs, key=lambda kind: theirs[kind])
        row["theirs_mb"] = theirs[row["variant"]]
        row["ratio"] = row["theirs_mb"] / ours
        row["met"] = row["ratio"] >= 1.5
        row["remark"] += f"; theirs {row['theirs_mb']:.0f} MB ({row['variant']})"
    return bench.add(row)


def _peak_of(kind: str, name: str, n: int, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.train", kind, name, str(n), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def measure_peak(kind: str, name: str, n: int, threads: int) -> float:
    """Megabytes that two training steps add, at their peak, to a process that has done a step of a batch of one (Linux only).

    The baseline so includes libraries, compiled kernels and a network's weights, and the rest are the activations of a large
    batch beside weights, gradients and optimiser state of the network measured.
    """
    from benchmarks.memory import peak, reset_peak, resident

    config = preset(name)
    if kind in ("ours", "checkpointed"):
        td.set_num_threads(threads)
    else:
        import torch

        torch.set_num_threads(threads)

    def make(batch: Batch) -> Step:
        if kind in ("ours", "checkpointed"):
            return our_step(config, batch, kind == "checkpointed")
        return torch_step(config, batch, kind)

    make(make_batch(1, config))()
    batch = make_batch(n, config)
    before = resident()
    reset_peak()
    step = make(batch)
    step()
    step()
    return (peak() - before) / 1e6


if __name__ == "__main__":
    print(json.dumps(measure_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
