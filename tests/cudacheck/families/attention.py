"""Attention of csrc/attention.cu, forward and backward: heads of all kinds of sizes, tiles that are not full, masks."""

from typing import Any

import numpy as np

from tests.cudacheck.family import Run, kernel_family
from tests.cudacheck.launchers import Array
from tests.cudacheck.pairwise import Row

DTYPES = {"float32": np.float32, "float64": np.float64}  # in the order of enum Precision
ROUNDING = {"float32": 1e-5, "float64": 1e-13}  # as a part of the sum of the terms' magnitudes
MASKS = ("none", "causal", "of keys", "of all", "of keys, causal")
LARGEST = {"float32": 128, "float64": 64}


def _mask(kind: str, shape: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray | None:
    """What is stored of a mask of `shape` (n, heads, queries, keys): what repeats has the length 1."""
    n, _, queries, keys = shape
    if "of keys" in kind:  # the first are hidden, as padding in front is
        return np.tile((np.arange(keys) >= min(keys - 1, 66)).astype(np.uint8), (n, 1, 1, 1))
    if kind == "of all":
        mask = (rng.random(shape) < 0.5).astype(np.uint8)
        mask[:, :, queries // 2] = 0  # a query that sees nothing
        return mask
    return None


def _run(
    direction: str,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    mask: str,
    precision: str,
    alignment: int,
) -> Run:
    (n, h), (queries, keys), (size, value_size), dtype = heads, lengths, sizes, DTYPES[precision]
    rng = np.random.default_rng([n, queries, keys, size])
    shapes = {
        "q": (n, queries, h, size),
        "k": (n, keys, h, size),
        "v": (n, keys, h, value_size),
        "g": (n, queries, h, value_size),
    }
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    stored, scale = _mask(mask, (n, h, queries, keys), rng), 0.7 * size**-0.5
    seen = np.ones((n, h, queries, keys), bool) if stored is None else np.broadcast_to(stored != 0, (n, h, queries, keys))
    if "causal" in mask:
        seen = seen & np.tri(queries, keys, dtype=bool)

    q, k, v, g = (arrays[name].astype(float).transpose(0, 2, 1, 3) for name in "qkvg")
    weights = np.where(seen, np.exp(scale * q @ k.swapaxes(2, 3)), 0)
    total = weights.sum(3, keepdims=True)
    p = weights / np.where(total == 0, 1, total)
    out = p @ v
    logsumexp = np.log(np.where(total == 0, 1, total))[..., 0]
    given = {"q": arrays["q"], "k": arrays["k"], "v": arrays["v"]} | ({} if stored is None else {"mask": stored})
    strides = np.broadcast_to(stored, seen.shape).strides if stored is not None else (0, 0, 0, 0)
    numbers = [list(DTYPES).index(precision), n, h, queries, keys, size, value_size, "causal" in mask, *strides, scale]
    rounding = ROUNDING[precision]

    def stands(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.transpose(0, 2, 1, 3))

    if direction == "forward":
        expected: dict[str, Any] = {
            "out": (stands(out), stands(rounding * (p @ np.abs(v) + 0.1))),
            "logsumexp": (logsumexp, rounding * (1 + np.abs(logsumexp))),
        }
        names = ["q", "k", "v", "mask", "out", "logsumexp"]
        workspace = {}
    else:
        t = p * (g @ v.swapaxes(2, 3) - (g * out).sum(3, keepdims=True))
        size_of = p * (np.abs(g) @ np.abs(v).swapaxes(2, 3) + np.abs(g * out).sum(3, keepdims=True))
        answers = {
            "gq": (scale * t @ k, scale * size_of @ np.abs(k)),
            "gk": (scale * t.swapaxes(2, 3) @ q, scale * size_of.swapaxes(2, 3) @ np.abs(q)),
            "gv": (p.swapaxes(2, 3) @ g, p.swapaxes(2, 3) @ np.abs(g)),
        }
        expected = {name: (stands(a), stands(rounding * (b + 0.1))) for name, (a, b) in answers.items()}
        given |= {"g": arrays["g"], "out": stands(out).astype(dtype), "logsumexp": logsumexp.astype(dtype)}
        names = ["g", "q", "k", "v", "mask", "out", "logsumexp", "gq", "gk", "gv", "workspace"]
        workspace = {"workspace": np.zeros((n, h, queries), dtype)}
    outputs = {name: np.zeros(answer.shape, dtype) for name, (answer, _) in expected.items()}
    there = {*given, *outputs, *workspace}
    arguments = [*numbers, *(Array(name) if name in there else None for name in names), 0]
    return Run("attention" if direction == "forward" else "attention_backward", arguments, given, outputs, expected, workspace)


def _valid(row: Row) -> bool:
    return max(row["sizes"]) <= LARGEST[row["precision"]]


FAMILIES = [
    kernel_family(
        "attention",
        ["attention.cu"],
        {
            "direction": ("forward", "backward"),
            "heads": ((1, 1), (2, 3)),  # samples and heads
            "lengths": ((1, 1), (17, 70), (70, 17), (65, 33), (66, 130)),  # queries and keys
            "sizes": ((4, 4), (7, 5), (24, 40), (64, 32), (72, 128)),  # of a head's keys and values
            "mask": MASKS,
            "precision": tuple(DTYPES),
        },
        _run,
        valid=_valid,
        typical=[
            {"direction": direction, "precision": precision, "heads": (1, 1), "lengths": (128, 128), "sizes": (64, 64)}
            | {"mask": "none", "alignment": 4}
            for direction in ("forward", "backward")
            for precision in DTYPES
        ],
    )
]
