"""Which CUDA convolution to launch: the written rule.

The rule follows from what each version needs (csrc/: the header of each file) and from the roofline model; it is not yet tuned
by measurement on a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

VERSIONS = (  # in the order of enum Version in csrc/kernels.h
    "direct",
    "small_c",
    "igemm_simt",
    "igemm_simt_64",
    "igemm_async",
    "igemm_async_64",
    "igemm_tc",
    "igemm_tc_64",
    "wino_f2",
)
DIRECTIONS = ("forward", "input_grad", "weight_grad")
ACTIVATIONS = (None, "silu", "relu")
PRECISIONS = ("float32", "float64", "tf32", "bf16")
LARGEST_KERNEL = 16  # of the implicit products
FEW = 4  # channels of an image or of a result
SHARED_BYTES = 48 << 10
WINOGRAD_CHANNELS = 64  # below, the transforms' memory traffic costs more than the products save


class ConvSize(NamedTuple):
    """x (n, h, w, c), weight (kh, kw, c, o), y (n, p, q, o), strides (sh, sw), zeros above and left of x (top, left)."""

    n: int
    h: int
    w: int
    c: int
    o: int
    kh: int
    kw: int
    p: int
    q: int
    sh: int
    sw: int
    top: int
    left: int


def choose(
    direction: str,
    size: ConvSize,
    precision: str,
    capability: tuple[int, int],
    aligned: bool,
    multiprocessors: int = 108,
) -> tuple[str, str]:
    """The version and the precision it is asked for.

    Args:
        precision: "float64" for arrays of float64; for float32 "float32" (exact), or "tf32" or "bf16" where rounding the
            factors is allowed: where tensor cores can't take the problem, it is computed in float32.
        capability: of the GPU, (8, 0) for sm_80. aligned: x, weight and y all lie at multiples of 16 bytes.

    The first line that holds decides:
        1. a kernel over 16 × 16: direct.
        2. at most 4 channels on one side, and forward, or the input gradient at stride 1: small_c, if its weights fit.
        3. tf32 or bf16 allowed, sm_80, channels multiples of 4 or 8, aligned: igemm_tc.
        4. float32, 3 × 3, stride 1, not the weight gradient, 64 channels or more on both sides: wino_f2.
        5. float32, sm_80, channels multiples of 4, aligned: igemm_async.
        6. igemm_simt.
    Of 3, 5 and 6 the 64 × 64 tile where the 128 × 128 one would give less than a block for each multiprocessor, or be half
    empty; and for float64.
    """
    plain = "float64" if precision == "float64" else "float32"

    if max(size.kh, size.kw) > LARGEST_KERNEL:
        return "direct", plain
    if takes("small_c", direction, size, plain, capability, aligned):
        return "small_c", plain
    multiple = math.gcd(size.c, size.o) if aligned and capability >= (8, 0) else 1
    suffix = "" if _fills(direction, size, multiprocessors) else "_64"
    if (precision == "tf32" and multiple % 4 == 0) or (precision == "bf16" and multiple % 8 == 0):
        return "igemm_tc" + suffix, precision
    if precision == "float64":
        return "igemm_simt_64", precision
    if takes("wino_f2", direction, size, plain, capability, aligned) and min(size.c, size.o) >= WINOGRAD_CHANNELS:
        return "wino_f2", plain
    return ("igemm_async" if multiple % 4 == 0 else "igemm_simt") + suffix, plain


def _fills(direction: str, size: ConvSize, multiprocessors: int) -> bool:
    """Whether tiles of 128 × 128 give every multiprocessor work (a weight gradient is cut into parts until they do)."""
    rows, columns, phases = size.n * size.p * size.q, size.o, 1
    if direction == "input_grad":
        phases = size.sh * size.sw
        rows, columns = size.n * -(-size.h // size.sh) * -(-size.w // size.sw), size.c
    elif direction == "weight_grad":
        return min(size.kh * size.kw * size.c, size.o) > 64
    return columns > 64 and -(-rows // 128) * -(-columns // 128) * phases >= multiprocessors


OFFERS = {  # by version: what c and o must be multiples of, in each precision that there is
    "direct": {"float32": 1, "float64": 1},
    "small_c": {"float32": 1, "float64": 1},
    "igemm_simt": {"float32": 1},
    "igemm_simt_64": {"float32": 1, "float64": 1},
    "igemm_async": {"float32": 4},
    "igemm_async_64": {"float32": 4},
    "igemm_tc": {"tf32": 4, "bf16": 8},
    "igemm_tc_64": {"tf32": 4, "bf16": 8},
    "wino_f2": {"float32": 1},
}


def takes(version: str, direction: str, size: ConvSize, precision: str, capability: tuple[int, int], aligned: bool) -> bool:
    """Whether a version can do a problem in a precision; arguments as in `choose`."""
    if precision not in OFFERS[version] or math.gcd(size.c, size.o) % OFFERS[version][precision]:
        return False
    if version.startswith(("igemm_async", "igemm_tc")) and not (aligned and capability >= (8, 0)):
        return False
    unit_stride = (size.sh, size.sw) == (1, 1)
    if version == "small_c":
        image, result = (size.o, size.c) if direction == "input_grad" else (size.c, size.o)
        held = [64] * (image <= FEW) + [result] * (result <= FEW)  # results of which a block holds the weights
        bytes_each = size.kh * size.kw * image * (8 if precision == "float64" else 4)
        fits = any(n * bytes_each <= SHARED_BYTES for n in held)
        return fits and (direction == "forward" or (direction == "input_grad" and unit_stride))
    if version == "wino_f2":
        return (size.kh, size.kw) == (3, 3) and unit_stride and direction != "weight_grad"
    return version == "direct" or max(size.kh, size.kw) <= LARGEST_KERNEL
