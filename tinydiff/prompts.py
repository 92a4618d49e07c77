"""Pictures from words: a frozen text encoder turns prompts into vectors, and a conditional UNet looks at these while it draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from tinydiff import io
from tinydiff.attention_maps import watching
from tinydiff.autograd import no_grad
from tinydiff.contrastive import TOKENIZER
from tinydiff.models.clip import CLIP, CLIPTextModel
from tinydiff.nn import no_init
from tinydiff.pipeline import Conditioned, Pipeline, load_model, load_space, model_folder, weights_hash
from tinydiff.space import Pixels, Space
from tinydiff.tensor import as_tensor
from tinydiff.tokenizer import Tokenizer

TASK = "text-to-image"
ENCODER = "text_encoder"  # folder beside the weights of a UNet, as in the published layout
GUIDANCE = 5.0
BATCH = 256
END = "(end)"


class TextEncoder:
    """A tokeniser and a frozen text transformer: prompts to what cross-attention looks at, a vector for each token.

    Attributes:
        length: vectors for a prompt, whatever it says. width: numbers in each.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: Tokenizer) -> None:
        if tokenizer.length != model.config["max_position_embeddings"] or len(tokenizer) != model.config["vocab_size"]:
            raise ValueError(
                f"the tokeniser has {len(tokenizer)} tokens in rows of {tokenizer.length}, and the text encoder is made for "
                f"{model.config['vocab_size']} in rows of {model.config['max_position_embeddings']}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.length, self.width = tokenizer.length, model.config["hidden_size"]
        model.requires_grad_(False).eval()

    @classmethod
    def of_run(cls, run: str | Path) -> TextEncoder:
        """From a run of `train clip`, or one that has a text encoder with it. Raises FileNotFoundError or ValueError."""
        folder = model_folder(run)
        if (folder / ENCODER).is_dir():
            return cls.load(folder)
        clip = cast(CLIP, load_model(run, "clip")[0])
        encoder = clip.text_encoder()
        return cls(encoder, Tokenizer.load(folder / TOKENIZER, encoder.config["max_position_embeddings"]))

    @classmethod
    def load(cls, folder: str | Path) -> TextEncoder:
        """From a folder that `save` wrote to. Raises FileNotFoundError or ValueError."""
        folder = Path(folder)
        config = io.read_json(folder / ENCODER / "config.json")
        try:
            with no_init():
                model = CLIPTextModel.from_config(config)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{folder / ENCODER / 'config.json'} describes no text encoder: {error}") from error
        model.load_published(io.load_weights(folder / ENCODER / "model.safetensors"))
        return cls(model, Tokenizer.load(folder / TOKENIZER, model.config["max_position_embeddings"]))

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads."""
        folder = Path(folder)
        (folder / ENCODER).mkdir(parents=True, exist_ok=True)
        io.write_json(folder / ENCODER / "config.json", self.model.config)
        weights = {name: io.to_disk(name, p.data, p.layout) for name, p in self.model.named_parameters()}
        io.save_weights(folder / ENCODER / "model.safetensors", weights)
        self.tokenizer.save(folder / TOKENIZER)

    @property
    def hash(self) -> str:
        """A short hash of the weights."""
        return weights_hash(self.model)

    def words(self, prompt: str) -> list[str]:
        """What each of the prompt's vectors stands for: tokens as text, between a begin and the ends that fill the row."""
        numbers = self.tokenizer.encode(prompt)[: self.length - 2]
        words = ["(begin)", *(self.tokenizer.decode([number]) for number in numbers)]
        return words + [END] * (self.length - len(words))

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Vectors (N, length, width) float32. Warns of the words that don't fit, which are dropped."""
        parts = [np.zeros((0, self.length, self.width), np.float32)]
        for start in range(0, len(prompts), BATCH):
            with no_grad():
                parts.append(self.model(self.tokenizer(prompts[start : start + BATCH])).numpy())
        return np.concatenate(parts)


class TextPipeline(Conditioned):
    """A conditional UNet with the text encoder it was trained with: draws what prompts say."""

    def __init__(self, model: Any, card: dict[str, Any], text: TextEncoder, space: Space | None = None) -> None:
        super().__init__(model, card, space)
        self.text = text

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu") -> TextPipeline:
        """From a run folder; it computes on `device`. Raises ValueError for one that holds something else."""
        model, card = load_model(run, TASK, device)
        text = TextEncoder.load(model_folder(run))
        if text.hash != card["text"]:
            raise ValueError(f"{run} was trained with the text encoder {card['text']}, and holds {text.hash}; restore the folder")
        return cls(model, card, text, load_space(run, card, device))

    def _predict(self, x: np.ndarray, t: np.ndarray, condition: np.ndarray) -> np.ndarray:
        with no_grad():
            return self.model(as_tensor(x).to(self.model.device), t, condition).numpy()

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        guidance: float = GUIDANCE,
        **settings: Any,
    ) -> np.ndarray:
        """One picture a seed: uint8 (N, H, W, C), of prompts[i]. `settings` are those of `sample`.

        Guidance leads away from what `negative` says; by default that is nothing, as when captions are dropped in training.
        Raises ValueError for another number of prompts than of seeds.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds; give one a picture")
        return self.sample(self.text(prompts), self.text([negative]), list(seeds), guidance=guidance, **settings)

    def look(
        self, prompt: str, seed: int, *, negative: str = "", guidance: float = GUIDANCE, **settings: Any
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Draw a picture and see where it looked at which word: (H, W, C) uint8, words, and maps (H, W, words).

        A map is the share of attention that a word had at each pixel, averaged over steps, layers and heads; what the begin and
        the ends had, which is the most, makes up the rest to 1.
        """
        with watching(self.model, 1, self.space.size[:2]) as seen:
            picture = self.draw([prompt], [seed], negative=negative, guidance=guidance, **settings)[0]
        words = self.text.words(prompt)[1:]
        height, width = self.space.shape[:2]
        border = self.space.border if isinstance(self.space, Pixels) else 0
        maps = seen.mean(height + 2 * border, width + 2 * border)[0, border : height + border, border : width + border]
        count = len(words) - words.count(END)
        return picture, words[:count], maps[..., 1 : 1 + count]

    def walk(
        self, prompts: Sequence[str], between: int, seed: int, *, negative: str = "", guidance: float = GUIDANCE, **settings: Any
    ) -> np.ndarray:
        """One noise drawn for texts on the way from each prompt to the next, in `between` stages that mix vectors linearly.

        Gives uint8 ((P - 1) · between + 1, H, W, C) for P prompts. Raises ValueError for fewer than two prompts or one stage.
        """
        if len(prompts) < 2 or between < 1:
            raise ValueError(
                f"{len(prompts)} prompts, {between} stages; a way has at least two prompts, with at least a stage between"
            )
        vectors = self.text(prompts)
        shares = (np.arange(between, dtype=np.float32) / between)[:, None, None]
        way = np.concatenate([*(a + shares * (b - a) for a, b in pairwise(vectors)), vectors[-1:]])
        return self.sample(way, self.text([negative]), [seed] * len(way), guidance=guidance, **settings)


def load_pipeline(run: str | Path, device: str = "cpu") -> Pipeline | TextPipeline:
    """What draws with a run, be it told classes or words. Raises ValueError for a run that draws nothing."""
    told_words = io.read_json(model_folder(run) / "config.json").get("task") == TASK
    return TextPipeline.load(run, device) if told_words else Pipeline.load(run, device)
