"""The autoencoder: a training step at 64×64 and 256×256, and encoding and decoding 512×512 pixels at the published size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side
from benchmarks.train import our_updates, torch_updates

KL = 1e-4
TARGET = 1.5
TRAINED: dict[str, Any] = {
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
PUBLISHED: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def build(config: dict[str, Any]) -> td.models.AutoencoderKL:
    """Ours, the same for the same config."""
    td.manual_seed(0)
    return td.models.AutoencoderKL.from_config(config)


def layouts() -> dict[str, Any]:
    """PyTorch's two."""
    import torch

    return {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def step_case(bench: Bench, n: int, size: int, config: dict[str, Any]) -> Case:
    """A training step: squared error of the pictures and a little KL divergence; then clipping, AdamW, moving average."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32)
    made = build(config)
    side = -(-size // made.factor)
    noise = rng.standard_normal((n, side, side, made.config["latent_channels"]), np.float32)
    weight = KL / math.prod(x.shape[1:])

    def ours() -> Side:
        model, pictures, drawn = build(config), td.from_numpy(x), td.from_numpy(noise)
        update = our_updates(model.parameters())

        def step() -> float:
            latents = model.encode(pictures)
            z = latents.mean + td.ops.exp(0.5 * latents.logvar) * drawn
            return update(td.ops.mse_loss(model.decode(z), pictures) + weight * td.ops.mean(latents.kl()))

        return Side(step, lambda loss: [np.array([loss, step(), step()])])

    def theirs(layout: Any) -> Side:
        from benchmarks.twin import channels_first, twin

        model = twin(build(config)).to(memory_format=layout)
        pictures, drawn = (channels_first(a).to(memory_format=layout) for a in (x, noise))
        update = torch_updates(list(model.parameters()))

        def step() -> float:
            mean, logvar = model.encode(pictures)
            back = model.decode(mean + (0.5 * logvar).exp() * drawn)
            divergence = 0.5 * (mean * mean + logvar.exp() - logvar - 1.0).sum((1, 2, 3)).mean()
            return update(bench.torch.nn.functional.mse_loss(back, pictures) + weight * divergence)

        return Side(step, lambda loss: [np.array([loss, step(), step()])])

    against = {name: theirs(layout) for name, layout in layouts().items()} if bench.torch else {}
    title = f"training step at {size}×{size}, batch {n}"
    return Case("autoencoder", title, ours(), against, TARGET, counted=True, tolerance=1e-3)


def whole_cases(bench: Bench, size: int, config: dict[str, Any]) -> list[Case]:
    """Encoding one picture, and decoding one picture's latents."""
    model = build(config).requires_grad_(False)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    z = rng.standard_normal((1, size // model.factor, size // model.factor, model.config["latent_channels"]), np.float32)

    def ours(run: Any) -> Side:
        def call() -> Any:
            with td.no_grad():
                return run()

        return Side(call, lambda y: [y.numpy()])

    def theirs(name: str, given: np.ndarray, layout: Any) -> Side:
        from benchmarks.twin import channels_first, channels_last, twin

        made = twin(model).to(memory_format=layout).eval()
        there = channels_first(given).to(memory_format=layout)

        def call() -> Any:
            with bench.torch.inference_mode():
                return made.encode(there)[0] if name == "encode" else made.decode(there)

        return Side(call, lambda y: [channels_last(y)])

    made = []
    for name, given, run in (
        ("encode", x, lambda: model.encode(td.from_numpy(x)).mean),
        ("decode", z, lambda: model.decode(td.from_numpy(z))),
    ):
        against = {key: theirs(name, given, layout) for key, layout in layouts().items()} if bench.torch else {}
        title = f"{name} {size}×{size}, {sum(p.data.size for p in model.parameters()) / 1e6:.1f} M parameters"
        made.append(Case("autoencoder", title, ours(run), against, TARGET, counted=True, tolerance=1e-3))
    return made


def run(bench: Bench) -> None:
    """The suite."""
    for n, size in ((16, 64), (2, 256)):
        bench.run(step_case(bench, n, size, TRAINED))
    for case in whole_cases(bench, *((64, TRAINED) if bench.settings.quick else (512, PUBLISHED))):
        bench.run(case)
