"""Training a text encoder and a picture encoder to meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinydiff import figures, models, random
from tinydiff.augment import jitter
from tinydiff.autograd import no_grad
from tinydiff.contrastive import TOKENIZER, Matcher, background, contrastive_loss, guessing, measure, same_pairs
from tinydiff.data.shapes import misleading
from tinydiff.images import from_uint8
from tinydiff.nn import Module
from tinydiff.pipeline import check_card
from tinydiff.tasks.base import Config, OnPictures, check_share, cut_silently, notes_on_length
from tinydiff.tensor import Tensor, as_tensor
from tinydiff.tokenizer import BOS, END, EOS, Tokenizer, split

TEXT: Config = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
CONV: Config = {"hidden_size": 128, "widths": [32, 64, 128], "norm_num_groups": 8}
VIT: Config = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 4,
}
SHAPES: Config = {"misleading": 11, "batch_size": 64, "lr": 1.5e-3, "made_up": 0.0, "augment": False}
STUCK = 0.98  # of the loss of guessing: no less than this is no progress
PROBES = 4  # batches in which that is looked for
PROBE = 500  # pictures that a showing measures


class ClipTask(OnPictures):
    """Two encoders whose vectors are alike for a picture and what is said of it, and unlike for the rest of the batch.

    Pictures are moved, turned and stretched a little; captions get made-up words in between, so that words never met in training
    are passed over rather than taken for something. Of shapes there are false captions besides, since colours alone tell most
    scenes of a batch apart.
    """

    DEFAULTS: ClassVar[Config] = {
        "vocab_size": 1024,  # at most, of the tokeniser trained on the captions
        "augment": True,
        "made_up": 0.5,  # how often a caption gets made-up words
        "misleading": 3,  # false captions for each picture of shapes: words exchanged, or one wrong
        "batch_size": 256,
        "lr": 1e-3,
        "betas": [0.9, 0.98],
    }
    PRESETS: ClassVar[dict[str, Config]] = {
        "small": {"model": {"projection_dim": 64, "text_config": TEXT, "vision_config": CONV}},
        "base": {
            "model": {
                "projection_dim": 64,
                "text_config": TEXT | {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4},
                "vision_config": CONV | {"hidden_size": 192, "widths": [64, 128, 192]},
            }
        },
        "vit": {"model": {"projection_dim": 64, "text_config": TEXT, "vision_config": VIT}},
    }

    @classmethod
    def presets(cls, options: Mapping[str, Any]) -> dict[str, Config]:
        """See `Task`. Shapes are told apart by what is said of them falsely, and there are enough of them as they are."""
        if str(options.get("data", "")).partition(":")[0] != "shapes":
            return cls.PRESETS
        return {name: preset | SHAPES for name, preset in cls.PRESETS.items()}

    def __init__(self, config: Config, parts: Path | None = None) -> None:
        super().__init__(config, parts)
        check_share(config, "made_up")
        if self.data.captions is None:
            raise ValueError(f"data {config['data']!r} has no captions; use digits, shapes, page, pictures or pairs:PAGE.html")
        if self.data.images.shape[1] != self.data.images.shape[2]:
            raise ValueError(f"data {config['data']!r}: pictures must be as high as wide, not {self.data.images.shape[1:3]}")
        self.captions = self.data.captions
        length = config["model"]["text_config"].get("max_position_embeddings", 77)
        if parts is not None:
            self.tokenizer = Tokenizer.load(parts / TOKENIZER, length)
        else:
            self.tokenizer = Tokenizer.train(self.captions.every(), config["vocab_size"], length)
        self.notes += notes_on_length(self.captions, self.tokenizer)
        self.background = background(self.data.images)
        self.pieces = _pieces(self.tokenizer, self.captions.every())
        self._ends = {number for symbol, number in self.tokenizer.vocab.items() if symbol.endswith(END)}
        check_card(self.card())

    def store(self, folder: Path) -> None:
        """See `Task`: the tokeniser's files."""
        self.tokenizer.save(folder / TOKENIZER)

    def card(self) -> Config:
        """See `Task`."""
        return self.describe() | {"model": self.model_config()}

    def model_config(self) -> Config:
        """The network's configuration, its sizes taken from the data and the tokeniser."""
        height, _, channels = self.data.images.shape[1:]
        given = self.config["model"]
        text = {"vocab_size": len(self.tokenizer), "eos_token_id": self.tokenizer.eos} | given["text_config"]
        return given | {
            "text_config": text,
            "vision_config": {"image_size": height, "num_channels": channels} | given["vision_config"],
        }

    def build(self) -> Module:
        """See `Task`."""
        random.manual_seed(self.config["seed"])
        return models.CLIP.from_config(self.model_config())

    def pairs(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures (N, H, W, C) in [-1, 1], tokens (M, length) of captions, and `same_pairs` (N, M), of step `step`.

        The first N captions are those of the pictures; the rest are false.
        """
        index, rng = self.indices(step), self.rng(step)
        x = from_uint8(self.data.images[index])
        if self.config["augment"]:
            x = jitter(x, rng, background=self.background)
        captions = self.captions.draw(index, self.config["seed"], step)
        said = [self.captions[i] for i in index]
        if self.config["misleading"] and self.config["data"].partition(":")[0] == "shapes":
            captions += [
                false
                for group, caption in zip(said, list(captions))
                for false in misleading(group, caption, rng, self.config["misleading"])
            ]
        rows = np.full((len(captions), self.tokenizer.length), self.tokenizer.eos, np.int64)
        for row, caption in zip(rows, captions):
            tokens = self.tokenizer.encode(caption)
            if rng.random() < self.config["made_up"]:
                tokens = self._with_made_up(tokens, rng)
            tokens = tokens[: len(row) - 2]
            row[0], row[1 : 1 + len(tokens)] = self.tokenizer.bos, tokens
        return x, rows, same_pairs(said, captions)

    def _with_made_up(self, tokens: list[int], rng: np.random.Generator) -> list[int]:
        """The tokens with one to three words between them that mean nothing, where these fit."""
        inner, last = self.pieces
        for _ in range(rng.integers(1, 4)):
            word = [*rng.choice(inner, rng.integers(0, 4)).tolist(), int(rng.choice(last))]
            ends = [i + 1 for i, token in enumerate(tokens) if token in self._ends]
            place = int(rng.choice([0, *ends]))
            if len(tokens) + len(word) <= self.tokenizer.length - 2:
                tokens = [*tokens[:place], *word, *tokens[place:]]
        return tokens

    def loss(self, model: Module, step: int) -> Tensor:
        """See `contrastive_loss`."""
        assert isinstance(model, models.CLIP)
        x, rows, same = self.pairs(step)
        seen = model.image_features(as_tensor(x).to(model.device))
        return contrastive_loss(seen, model.text_features(rows), model.logit_scale, same)

    @cut_silently()
    def show(self, model: Module, step: int, folder: Path) -> dict[str, float]:
        """What `measure` finds; "guessing" is 1 if the loss is still that of vectors that say nothing."""
        assert isinstance(model, models.CLIP)
        matcher = Matcher(model, self.tokenizer, self.card())
        found = measure(matcher, self.config["data"], self.config["size"], PROBE)
        shown = np.unique(self.captions.meaning, return_index=True)[1][:12]
        captions = [self.captions[i][0] for i in shown]
        pictures = self.data.images[shown]
        scores, settings = matcher.scores(pictures, captions), {"step": str(step), "captions": captions}
        figures.score_map(scores, pictures, captions, folder / f"step-{step:06d}.png", settings=settings)
        losses, chances = [], []
        for probe in range(PROBES):
            x, rows, same = self.pairs(max(step - 1 - probe, 0))
            with no_grad():
                seen, said = model.image_features(as_tensor(x).to(model.device)), model.text_features(rows)
                losses.append(contrastive_loss(seen, said, model.logit_scale, same).item())
            chances.append(guessing(same))
        chance = float(np.mean(chances))
        return found | {"loss_of_guessing": chance, "guessing": float(np.mean(losses) > STUCK * chance)}


def _pieces(tokenizer: Tokenizer, captions: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that made-up words are put together from: those inside words, and those that end one.

    Such as are a word of the captions by themselves are left out: they mean something.
    """
    words = {piece for caption in captions for piece in split(caption)}
    tokens = [symbol for symbol in tokenizer.vocab if symbol not in (BOS, EOS) and symbol.removesuffix(END) not in words]
    inner = [tokenizer.vocab[symbol] for symbol in tokens if not symbol.endswith(END)]
    return np.array(inner), np.array([tokenizer.vocab[symbol] for symbol in tokens if symbol.endswith(END)])
