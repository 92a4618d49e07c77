"""The UNet that is told words: a training step among pixels and among latents, the text's vectors given."""

from __future__ import annotations

from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side
from benchmarks.train import our_updates, torch_updates
from tinydiff.tasks.clip import TEXT
from tinydiff.tasks.denoising import latent_unet
from tinydiff.tasks.text_to_image import TextToImageTask

TARGET = 1.5
WIDTH, LENGTH = TEXT["hidden_size"], TEXT["max_position_embeddings"]  # of the text's vectors, as `train clip` makes them


def preset(name: str, size: tuple[int, int, int], latents: bool, **changes: Any) -> dict[str, Any]:
    """The network that `tinydiff train text-to-image --preset NAME` builds for (height, width, channels) of pixels or latents."""
    given = TextToImageTask.presets({"latents": "RUN" if latents else None})[name]["model"]
    widths = TextToImageTask.LATENT_WIDTHS[name]
    network = latent_unet(size, widths, "CrossAttn") if latents else {}
    channels = {"in_channels": size[2], "out_channels": size[2], "cross_attention_dim": WIDTH}
    return network | channels | given | changes


def build(config: dict[str, Any]) -> td.models.UNet2DConditionModel:
    """Ours, the same for the same config."""
    td.manual_seed(0)
    return td.models.UNet2DConditionModel.from_config(config)


def step_case(bench: Bench, name: str, n: int, size: tuple[int, int], config: dict[str, Any]) -> Case:
    """A training step: the squared error of the prediction; then clipping, AdamW, moving average."""
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, n, *size, config["in_channels"]), np.float32)
    t = rng.integers(0, 1000, n).astype(np.float32)
    context = rng.standard_normal((n, LENGTH, config["cross_attention_dim"]), np.float32)

    def ours() -> Side:
        model, noisy, wanted = build(config), td.from_numpy(x), td.from_numpy(target)
        update = our_updates(model.parameters())

        def step() -> float:
            return update(td.ops.mse_loss(model(noisy, t, context), wanted))

        return Side(step, lambda loss: [np.array([loss, step(), step()])])

    def theirs(layout: Any) -> Side:
        from benchmarks.twin import channels_first, twin

        torch = bench.torch
        model = twin(build(config)).to(memory_format=layout)
        noisy, wanted = (channels_first(a).to(memory_format=layout) for a in (x, target))
        times, told = torch.from_numpy(t), torch.from_numpy(context)
        update = torch_updates(list(model.parameters()))

        def step() -> float:
            return update(torch.nn.functional.mse_loss(model(noisy, times, told), wanted))

        return Side(step, lambda loss: [np.array([loss, step(), step()])])

    against = {}
    if bench.torch:
        formats = {"contiguous": bench.torch.contiguous_format, "channels_last": bench.torch.channels_last}
        against = {key: theirs(layout) for key, layout in formats.items()}
    return Case("words", f"training step, {name}, batch {n}", ours(), against, TARGET, counted=True, tolerance=1e-3)


def run(bench: Bench) -> None:
    """The suite: digits in pixels, drawings of 32×32 in pixels, latents of digits and of drawings of 64×64."""
    cases = [("28×28 pixels", (28, 28, 1), False), ("7×7 latents", (7, 7, 4), True)]
    if not bench.settings.quick:
        cases += [("32×32 RGB pixels", (32, 32, 3), False), ("16×16 latents", (16, 16, 8), True)]
    for name, size, latents in cases:
        bench.run(step_case(bench, f"small, {name}", 32 if size[0] < 32 else 64, size[:2], preset("small", size, latents)))
