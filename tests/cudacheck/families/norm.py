"""The normalisations and softmax of csrc/, forward and backward."""

from typing import Any

import numpy as np

from tests.cudacheck.family import Run, kernel_family
from tests.cudacheck.launchers import Array
from tests.cudacheck.pairwise import Row

DTYPES = {"float32": np.float32, "float64": np.float64}  # in the order of enum Precision
ROUNDING = {"float32": 4e-6, "float64": 1e-13}  # as a part of the sum of the terms' magnitudes
DIRECTIONS = ("forward", "backward")
PARAMETERS = ("weight and bias", "weight", "neither")
EPS = 1e-3


def _sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


ACTIVATIONS = {  # in the order of enum Activation: the function and its derivative
    "none": (lambda v: v, np.ones_like),
    "silu": (lambda v: v * _sigmoid(v), lambda v: _sigmoid(v) * (1 + v * (1 - _sigmoid(v)))),
    "relu": (lambda v: np.maximum(v, 0), lambda v: (v > 0).astype(float)),
}


def _arguments(numbers: list[Any], names: list[str], given: set[str]) -> list[Any]:
    return [*numbers, *(Array(name) if name in given else None for name in names), 0]


def _group_norm(
    direction: str,
    n: int,
    pixels: int,
    channels: tuple[int, int],
    activation: str,
    parameters: str,
    precision: str,
    alignment: int,
) -> Run:
    (c, groups), dtype = channels, DTYPES[precision]
    rng = np.random.default_rng([n, pixels, c])
    arrays = {
        "x": 3 + rng.standard_normal((n, pixels, c)),
        "g": rng.standard_normal((n, pixels, c)),
        "weight": rng.standard_normal(c),
        "bias": rng.standard_normal(c),
    }
    arrays = {name: a.astype(dtype) for name, a in arrays.items() if name in ("x", "g") or name in parameters}
    x, w, b = arrays["x"].astype(float), arrays.get("weight", np.ones(c)).astype(float), arrays.get("bias", np.zeros(c))
    grouped = x.reshape(n, pixels, groups, -1)
    mean, rstd = grouped.mean((1, 3)), (grouped.var((1, 3)) + EPS) ** -0.5

    def spread(v: np.ndarray) -> np.ndarray:
        return np.repeat(v, c // groups, 1)[:, None]

    def means(v: np.ndarray) -> np.ndarray:
        return spread(v.reshape(n, pixels, groups, -1).mean((1, 3)))

    xh = (x - spread(mean)) * spread(rstd)
    z = xh * w + b.astype(float)
    act, slope = ACTIVATIONS[activation]
    numbers = [list(DTYPES).index(precision), n, pixels, c, groups]
    workspace = {"workspace": np.zeros(GROUP_NORM.launchers.call("group_norm_workspace", numbers, {}) // 8 + 1)}
    code, rounding = list(ACTIVATIONS).index(activation), ROUNDING[precision]
    if direction == "forward":
        steep = spread(rstd) * (1 + np.abs(x))  # how far rounding x may move the normalised value
        expected = {
            "y": (act(z), 2 * rounding * (steep * np.abs(w) + np.abs(z) + 1)),
            "mean": (mean, rounding * (1 + np.abs(mean))),
            "rstd": (rstd, 5 * rounding * rstd),
        }
        names, numbers = ["x", "weight", "bias", "y", "mean", "rstd", "workspace"], [*numbers, EPS, code]
    else:
        gz = arrays["g"] * slope(z)
        gw = gz * w
        size = means(np.abs(gw)) + np.abs(xh) * means(np.abs(gw * xh)) + np.abs(gw)
        far = np.maximum(1, spread(rstd) * np.abs(x)) * np.maximum(1, np.abs(w))
        many = (np.maximum(1, spread(rstd) * np.abs(x)) * np.abs(arrays["g"]) * (1 + np.abs(xh)) * np.maximum(1, np.abs(w))).sum(
            (0, 1)
        )
        expected = {
            "gx": (spread(rstd) * (gw - means(gw) - xh * means(gw * xh)), 4 * rounding * (spread(rstd) * size * far + 1)),
            "gweight": ((gz * xh).sum((0, 1)), rounding * (many + 1)),
            "gbias": (gz.sum((0, 1)), rounding * (many + 1)),
        }
        for name in ("weight", "bias"):
            if name not in arrays:
                del expected[f"g{name}"]
        names = ["g", "x", "weight", "bias", "mean", "rstd", "gx", "gweight", "gbias", "workspace"]
        arrays |= {"mean": mean.astype(dtype), "rstd": rstd.astype(dtype)}
        numbers = [*numbers, code]
    inputs = {name: a for name, a in arrays.items() if name in names}
    outputs = {name: np.zeros(answer.shape, dtype) for name, (answer, _) in expected.items()}
    launcher = "group_norm" if direction == "forward" else "group_norm_backward"
    arguments = _arguments(numbers, names, {*inputs, *outputs, *workspace})
    return Run(launcher, arguments, inputs, outputs, expected, workspace)


def _layer_norm(direction: str, rows: int, size: int, parameters: str, precision: str, alignment: int) -> Run:
    dtype = DTYPES[precision]
    rng = np.random.default_rng([rows, size])
    drawn = {"x": 3 + rng.standard_normal((rows, size)), "g": rng.standard_normal((rows, size))}
    drawn |= {name: rng.standard_normal(size) for name in ("weight", "bias") if name in parameters}
    arrays = {name: a.astype(dtype) for name, a in drawn.items()}
    x, w, b = arrays["x"].astype(float), arrays.get("weight", np.ones(size)).astype(float), arrays.get("bias", np.zeros(size))
    mean, rstd = x.mean(1), (x.var(1) + EPS) ** -0.5
    xh = (x - mean[:, None]) * rstd[:, None]
    numbers, rounding = [list(DTYPES).index(precision), rows, size], ROUNDING[precision]
    far = np.maximum(1, rstd[:, None] * np.abs(x))
    workspace: dict[str, np.ndarray] = {}
    if direction == "forward":
        expected = {
            "y": (xh * w + b, 2 * rounding * (far * np.abs(w) + np.abs(xh * w) + np.abs(b) + 1)),
            "mean": (mean, rounding * (1 + np.abs(mean))),
            "rstd": (rstd, 5 * rounding * rstd),
        }
        names, numbers = ["x", "weight", "bias", "y", "mean", "rstd"], [*numbers, EPS]
    else:
        g = arrays["g"].astype(float)
        gw = g * w
        along = np.abs(xh) * np.abs(gw * xh).mean(1, keepdims=True)
        magnitude = np.abs(gw) + np.abs(gw).mean(1, keepdims=True) + along
        expected = {
            "gx": (
                rstd[:, None] * (gw - gw.mean(1, keepdims=True) - xh * (gw * xh).mean(1, keepdims=True)),
                4 * rounding * (rstd[:, None] * magnitude * far.max(1, keepdims=True) + 1),
            ),
            "gweight": ((g * xh).sum(0), rounding * ((np.abs(g) * far * (1 + np.abs(xh))).sum(0) + 1)),
            "gbias": (g.sum(0), rounding * (np.abs(g).sum(0) + 1)),
        }
        for name in ("weight", "bias"):
            if name not in arrays:
                del expected[f"g{name}"]
        names = ["g", "x", "weight", "mean", "rstd", "gx", "gweight", "gbias", "workspace"]
        arrays |= {"mean": mean.astype(dtype), "rstd": rstd.astype(dtype)}
        workspace["workspace"] = np.zeros(LAYER_NORM.launchers.call("layer_norm_workspace", numbers, {}) // 8 + 1)
    inputs = {name: a for name, a in arrays.items() if name in names}
    outputs = {name: np.zeros(answer.shape, dtype) for name, (answer, _) in expected.items()}
    launcher = "layer_norm" if direction == "forward" else "layer_norm_backward"
    return Run(launcher, _arguments(numbers, names, {*inputs, *outputs, *workspace}), inputs, outputs, expected, workspace)


def _softmax(direction: str, rows: int, size: int, logarithmic: bool, precision: str, alignment: int) -> Run:
    dtype, rounding = DTYPES[precision], ROUNDING[precision]
    rng = np.random.default_rng([rows, size])
    x = (10 * rng.standard_normal((rows, size))).astype(dtype)
    x[0, 0] += 1e3  # exp of which overflows
    x[-1, 1:] = -1e4 if logarithmic else -np.inf  # all weight on one
    shifted = x.astype(float) - x.max(1, keepdims=True)
    total = np.exp(shifted).sum(1, keepdims=True)
    p = np.exp(shifted) / total
    y = shifted - np.log(total) if logarithmic else p
    numbers = [list(DTYPES).index(precision), rows, size, logarithmic]
    if direction == "forward":
        bound = 2 * rounding * (1 + (np.abs(x) if logarithmic else 10))
        return Run("softmax", [*numbers, Array("x"), Array("y"), 0], {"x": x}, {"y": np.zeros_like(x)}, {"y": (y, bound)})
    g = rng.standard_normal(x.shape).astype(dtype)
    gx = g - p * g.sum(1, keepdims=True) if logarithmic else p * (g - (g * p).sum(1, keepdims=True))
    bound = 2 * rounding * (1 + np.abs(g).sum(1, keepdims=True)) * (1 + (p * np.abs(y) if logarithmic else 0))
    arguments = [*numbers, Array("g"), Array("y"), Array("gx"), 0]
    return Run("softmax_backward", arguments, {"g": g, "y": y.astype(dtype)}, {"gx": np.zeros_like(x)}, {"gx": (gx, bound)})


PRECISION = {"precision": tuple(DTYPES)}


def _typical(**common: Any) -> list[Row]:
    """Both directions, in both precisions."""
    rest = {**common, "alignment": 4}
    return [{**rest, "direction": direction, "precision": precision} for direction in DIRECTIONS for precision in DTYPES]


GROUP_NORM = kernel_family(
    "group_norm",
    ["group_norm.cu"],
    {
        "direction": DIRECTIONS,
        "n": (1, 3),
        "pixels": (1, 63, 65, 150),  # a slice has 64 or so
        "channels": ((6, 3), (33, 1), (40, 8), (130, 2)),  # and groups
        "activation": tuple(ACTIVATIONS),
        "parameters": PARAMETERS,
        **PRECISION,
    },
    _group_norm,
    typical=_typical(n=1, pixels=256, channels=(128, 32), activation="silu", parameters="weight and bias"),
)
LAYER_NORM = kernel_family(
    "layer_norm",
    ["layer_norm.cu"],
    {"direction": DIRECTIONS, "rows": (1, 9, 65, 151), "size": (1, 31, 33, 100), "parameters": PARAMETERS, **PRECISION},
    _layer_norm,
    typical=_typical(rows=128, size=256, parameters="weight and bias"),
)
SOFTMAX = kernel_family(
    "softmax",
    ["softmax.cu"],
    {"direction": DIRECTIONS, "rows": (1, 7, 9, 17), "size": (1, 31, 33, 200), "logarithmic": (False, True), **PRECISION},
    _softmax,
    typical=_typical(rows=64, size=1024, logarithmic=False),
)
FAMILIES = [GROUP_NORM, LAYER_NORM, SOFTMAX]
