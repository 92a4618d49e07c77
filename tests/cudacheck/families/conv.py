"""The convolutions of csrc/conv_*.cu: each version, in all directions, over awkward sizes."""

from typing import Any

import numpy as np

from tests.cudacheck.family import Family, Run, kernel_family
from tests.cudacheck.launchers import Array
from tests.cudacheck.pairwise import Row
from tinydiff.cudasim.build import csrc
from tinydiff.kernels.convrule import DIRECTIONS, OFFERS, PRECISIONS, VERSIONS

# Rounding, as a part of the sum of the terms' magnitudes: of the operands, or of the sums of float32.
ROUNDING = {"float32": 4e-6, "float64": 1e-14, "tf32": 2.1e-3, "bf16": 8e-3}
ACTIVATIONS = ("none", "silu", "relu")
AXES: dict[str, Any] = {
    "direction": DIRECTIONS,
    "n": (1, 3),
    "image": ((1, 1), (5, 7), (8, 9)),
    "kernel": ((1, 1), (3, 3), (2, 3), (7, 5)),
    "stride": ((1, 1), (2, 2), (3, 2)),
    "padding": (((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 2), (1, 0)), ((3, 2), (2, 3))),
    "channels": ((1, 1), (3, 6), (5, 3), (8, 16), (16, 8), (4, 68), (72, 4)),
    "split": (1, 3, 8),  # used by the weight gradient
    # of the forward direction
    "epilogue": (
        "none",
        "bias",
        "bias per sample, silu",
        "residual, relu",
        "bias, residual, silu, kept",
    ),
}


def _windows(row: Row) -> tuple[int, int]:
    (kh, kw), (sh, sw) = row["kernel"], row["stride"]
    (top, bottom), (left, right) = row["padding"]
    return (row["image"][0] + top + bottom - kh) // sh + 1, (row["image"][1] + left + right - kw) // sw + 1


def _valid(version: str, row: Row) -> bool:
    (top, bottom), (left, right) = row["padding"]
    (h, w), (kh, kw) = row["image"], row["kernel"]
    if h + top + bottom < kh or w + left + right < kw:
        return False
    multiple = OFFERS[version][row["precision"]]
    if any(c % multiple for c in row["channels"]):
        return False
    if version == "small_c":  # one side has few channels, an input gradient needs stride 1, and a block's weights fit in 48 KB
        few_in, few_out = row["channels"] if row["direction"] == "forward" else row["channels"][::-1]
        held = [few_in * columns for columns, few in ((64, few_in), (few_out, few_out)) if few <= 4]
        if not any(kh * kw * values * (8 if row["precision"] == "float64" else 4) <= 48 << 10 for values in held):
            return False
        return row["direction"] == "forward" or (row["direction"] == "input_grad" and row["stride"] == (1, 1))
    if version == "wino_f2":
        return row["direction"] != "weight_grad" and row["kernel"] == (3, 3) and row["stride"] == (1, 1)
    return True


def _convolve(direction: str, x: np.ndarray, w: np.ndarray, y: np.ndarray, row: Row) -> np.ndarray:
    """One direction in double precision, tap by tap: each tap is a product of matrices."""
    (sh, sw), (top, bottom), (left, right) = row["stride"], *row["padding"]
    p, q = y.shape[1:3]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    out = {"forward": np.zeros(y.shape), "input_grad": np.zeros(padded.shape), "weight_grad": np.zeros(w.shape)}[direction]
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            window = (slice(None), slice(i, i + sh * (p - 1) + 1, sh), slice(j, j + sw * (q - 1) + 1, sw))
            if direction == "forward":
                out += padded[window] @ w[i, j]
            elif direction == "input_grad":
                out[window] += y @ w[i, j].T
            else:
                out[i, j] = np.einsum("npqc,npqo->co", padded[window], y)
    return out[:, top : top + x.shape[1], left : left + x.shape[2]] if direction == "input_grad" else out


def _run(version: str, alignment: int, **row: Any) -> Run:
    direction, precision = row["direction"], row["precision"]
    (c, o), (h, v), n = row["channels"], row["image"], row["n"]
    p, q = _windows(row)
    dtype = np.float64 if precision == "float64" else np.float32
    rng = np.random.default_rng([h, v, c, o, p, q])
    x, w, y = (rng.standard_normal(s).astype(dtype) for s in ((n, h, v, c), (*row["kernel"], c, o), (n, p, q, o)))
    arrays = {"x": x, "w": w, "y": y}
    written = {"forward": "y", "input_grad": "x", "weight_grad": "w"}[direction]
    answer = _convolve(direction, *(a.astype(float) for a in (x, w, y)), row)
    size = _convolve(direction, *(np.abs(a.astype(float)) for a in (x, w, y)), row)
    inputs = {name: array for name, array in arrays.items() if name != written}

    epilogue = row["epilogue"] if direction == "forward" else "none"
    activation = next((a for a in ("silu", "relu") if a in epilogue), "none")
    per_sample = "per sample" in epilogue
    if "bias" in epilogue:
        inputs["bias"] = rng.standard_normal((n, o) if per_sample else (o,)).astype(dtype)
        bias = inputs["bias"].astype(float)
        answer = answer + (bias[:, None, None] if per_sample else bias)
        size = size + np.abs(bias).max()
    if "residual" in epilogue:
        inputs["residual"] = rng.standard_normal(y.shape).astype(dtype)
        answer = answer + inputs["residual"]
        size = size + np.abs(inputs["residual"])
    outputs, expected = {written: arrays[written]}, {}
    if "kept" in epilogue:  # what the activation is applied to
        outputs["before"], expected["before"] = y, answer
    if activation == "silu":
        answer = answer / (1 + np.exp(-answer))
    elif activation == "relu":
        answer = np.maximum(answer, 0)

    (top, _), (left, _) = row["padding"]
    problem = [VERSIONS.index(version), DIRECTIONS.index(direction), PRECISIONS.index(precision)]
    problem += [n, h, v, c, o, *row["kernel"], p, q, *row["stride"], top, left, row["split"] if direction == "weight_grad" else 0]
    scratch = FAMILY_OF[version].launchers.call("conv2d_workspace", problem, {})
    names = ["bias", "residual", "before", "x", "w", "y", "workspace"]
    given = {*inputs, *outputs, "workspace"}
    bound = ROUNDING[precision] * (5 * size.max() if version == "wino_f2" else size) + ROUNDING[precision]
    return Run(
        "conv2d",
        [*problem, per_sample, ACTIVATIONS.index(activation), *(Array(a) if a in given else None for a in names), 0],
        inputs=inputs,
        outputs=outputs,
        workspaces={"workspace": np.zeros(scratch // 8 + 1)},
        expected={name: (value, bound) for name, value in {**expected, written: answer}.items()},
        refused=version in WIDE and alignment != 4,
    )


SOURCES = ["conv2d.cu", *sorted({f"conv_{version.removesuffix('_64')}.cu" for version in VERSIONS})]
# These take 16 bytes at a time or nothing.
WIDE = tuple(version for version in VERSIONS if version.startswith(("igemm_async", "igemm_tc")))


def _family(version: str, name: str, axes: dict[str, Any], alignments: tuple[int, ...]) -> Family:
    return kernel_family(
        name,
        SOURCES,
        {**axes, "precision": tuple(OFFERS[version])},
        run=lambda **row: _run(version, **row),
        valid=lambda row: _valid(version, row),
        copies=version in WIDE,
        alignments=alignments,
        own=[csrc() / f"conv_{version.removesuffix('_64')}.cu"],
        typical=_typical(version) if axes is AXES else (),
    )


def _typical(version: str) -> list[Row]:
    """A tile of the largest size, filled, and a few steps of depth; of few channels a layer as they begin and end a network."""
    common = {"n": 1, "image": (8, 16), "kernel": (3, 3), "stride": (1, 1), "padding": ((1, 1), (1, 1)), "split": 1}
    common |= {"epilogue": "none", "alignment": 4}
    channels = {"forward": (16, 128), "input_grad": (128, 16), "weight_grad": (16, 128)}
    rows = [
        {**common, "direction": direction, "channels": pair, "precision": precision}
        for direction in DIRECTIONS
        for pair in ([(3, 64), (64, 3)] if version == "small_c" else [channels[direction]])
        for precision in OFFERS[version]
    ]
    return [row for row in rows if _valid(version, row)]


FAMILY_OF = {v: _family(v, f"conv {v}", AXES, (4,) if v in WIDE else (4, 2, 1)) for v in VERSIONS}
PLAIN = {**{name: values[:1] for name, values in AXES.items()}, "direction": DIRECTIONS, "channels": ((8, 16),)}
FAMILIES = [*FAMILY_OF.values(), *(_family(v, f"conv {v}, misaligned", PLAIN, (2, 1)) for v in WIDE)]
