"""Training a denoiser that is told a caption, by the vectors of a frozen text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from tinydiff import data, images, models
from tinydiff.nn import Module
from tinydiff.pipeline import check_card
from tinydiff.prompts import TextEncoder, TextPipeline
from tinydiff.tasks.base import Config, check_share, cut_silently, notes_on_length
from tinydiff.tasks.denoising import Denoising, latent_unet

UNET: Config = {
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,  # heads
    "norm_num_groups": 8,
}


class TextToImageTask(Denoising):
    """A conditional UNet that predicts the noise in a picture, told a caption of it or nothing."""

    NETWORK = models.UNet2DConditionModel
    DEFAULTS: ClassVar[Config] = Denoising.DEFAULTS | {
        "text": "",  # run of `train clip` whose text encoder to listen to
        "caption_drop": 0.1,  # how often the caption is withheld, for guidance
    }
    PRESETS: ClassVar[dict[str, Config]] = {
        "small": {"model": UNET | {"block_out_channels": [32, 64, 64], "layers_per_block": 1}},
        "base": {"model": UNET | {"block_out_channels": [64, 128, 128], "layers_per_block": 2}},
    }

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        check_share(config, "caption_drop")
        if self.data.captions is None:
            raise ValueError(f"data {config['data']!r} has no captions; use digits, shapes, pictures or page")
        if parts is None and not config["text"]:
            raise ValueError("no text encoder: train one with `tinydiff train clip --out CLIP_RUN`, then give --text CLIP_RUN")
        self.captions = self.data.captions
        self.text = TextEncoder.load(parts) if parts is not None else TextEncoder.of_run(config["text"])
        check_card(self.card())
        self.notes += notes_on_length(self.captions, self.text.tokenizer)

    def store(self, folder: Path) -> None:
        """See `Task`: the text encoder and its tokeniser, so that the run can draw on its own."""
        super().store(folder)
        self.text.save(folder)

    def card(self) -> Config:
        """See `Task`."""
        return super().card() | {"text": self.text.hash}

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data and the text encoder."""
        widths = self.LATENT_WIDTHS[self.config["preset"]]
        network = {} if self.autoencoder is None else latent_unet(self.space.size, widths, "CrossAttn")
        return network | {"cross_attention_dim": self.text.width} | super().model_config()

    @cut_silently()
    def told(self, step: int, rng: np.random.Generator) -> np.ndarray:
        """A caption of each picture as vectors (N, length, width); some are withheld, and say nothing: ""."""
        config, index = self.config, self.indices(step)
        dropped = rng.random(len(index)) < config["caption_drop"]
        captions = self.captions.draw(index, config["seed"], step)
        return self.text(["" if drop else caption for drop, caption in zip(dropped, captions)])

    @cut_silently()
    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """Four pictures for each of eight captions that training never sees, a row for each."""
        test = data.load(self.config["data"], split="test", size=self.config["size"])
        assert test.captions is not None
        prompts = test.captions.draw(np.linspace(0, len(test) - 1, 8).astype(int), 0, 0)
        pipeline = TextPipeline(model, self.card(), self.text, self.space)
        drawn = pipeline.draw([p for p in prompts for _ in range(4)], range(32), sampler="dpmpp_2m", steps=20)
        settings = {"step": str(step), "prompts": prompts}
        images.save_png(folder / f"step-{step:06d}.png", images.grid(drawn, columns=4, enlarged=2), settings)
        return {}
