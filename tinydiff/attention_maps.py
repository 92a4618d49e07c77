"""Where a picture looked at which word: cross-attention added up over heads, layers and steps (Tang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tinydiff.autograd import no_grad
from tinydiff.hooks import observing
from tinydiff.models.transformer import BasicTransformerBlock
from tinydiff.nn import Attention, Module
from tinydiff.tensor import Tensor


class AttentionMaps:
    """What was seen so far of pictures, or latents, of `size` (height, width), summed at each resolution.

    Attributes:
        sums: by (h, w): (samples, h, w, tokens) float64. count: how many layers were seen.
    """

    def __init__(self, samples: int, size: tuple[int, int]) -> None:
        self.samples, self.size = samples, size
        self.sums: dict[tuple[int, int], np.ndarray] = {}
        self.count = 0

    def see(self, attention: Attention, x: Tensor, context: Tensor) -> None:
        """Add the weights with which x (N, h · w, C) looks at the context; of a guided batch, those of its second, told half."""
        with no_grad():
            weights = attention.weights(x, context).numpy()[-self.samples :]
        h, w = self.size
        while h * w > weights.shape[2]:
            h, w = -(-h // 2), -(-w // 2)
        maps = weights.mean(1, dtype=np.float64).reshape(len(weights), h, w, -1)
        self.sums[h, w] = self.sums[h, w] + maps if (h, w) in self.sums else maps
        self.count += 1

    def mean(self, height: int, width: int) -> np.ndarray:
        """Over all that was seen, enlarged: (samples, height, width, tokens), adding up to 1 over the tokens of each pixel.

        Raises ValueError when nothing was seen.
        """
        if not self.count:
            raise ValueError("no cross-attention was seen; draw inside the block, with a model that looks at text")
        total = np.zeros(())
        for maps in self.sums.values():
            total = total + _enlarged(maps, height, width)
        return total / self.count


def _enlarged(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, h, w, S) to (N, height, width, S), linearly between the centres of pixels."""
    for axis, size in ((1, height), (2, width)):
        last = maps.shape[axis] - 1
        place = np.clip((np.arange(size) + 0.5) * (last + 1) / size - 0.5, 0, last)
        low = place.astype(int)
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        maps = maps.take(low, axis) * (1 - share) + maps.take(np.minimum(low + 1, last), axis) * share
    return maps


@contextmanager
def watching(model: Module, samples: int, size: tuple[int, int]) -> Iterator[AttentionMaps]:
    """A block in which what `model` looks at is added up, over batches that all are (or end with) the same `samples` samples.

    `size` is the (height, width) of what the model denoises.
    """
    found = AttentionMaps(samples, size)
    blocks = [module for _, module in model.named_modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.observer = found.see
    try:
        with observing(lambda call: None):  # no call of the model is replayed or cut into parts
            yield found
    finally:
        for block in blocks:
            block.observer = None
