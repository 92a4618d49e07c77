"""Where the loaders of csrc/igemm.h read and write, against the definition of convolution, element by element.

The loaders divide once and then walk by pointer steps and bit masks; here every address is computed anew from (row, depth).
"""

import ctypes
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinydiff.cudasim import Simulator, build
from tinydiff.kernels.convrule import DIRECTIONS, ConvSize

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

EACH, APART = 3, 5  # as in loaders.cu


@pytest.fixture(scope="module")
def library():
    source = Path(__file__).parent / "cudacheck" / "loaders.cu"
    return Simulator.load(build.link([build.kernel_object(source, "fast")], "fast")).library


class Twin:
    """One of a direction's products by the definition: for each element of its matrices where it lies, -1 for a zero.

    `z` is the phase of an input gradient, or the part of a weight gradient, of `pixels` pixels.
    """

    def __init__(self, direction, size, z, pixels):
        a = self.size = size
        taps = [(r, s) for r in range(a.kh) for s in range(a.kw)]
        outputs = [(n, p, q) for n in range(a.n) for p in range(a.p) for q in range(a.q)]
        if direction == "forward":
            self.rows, self.columns = outputs, list(range(a.o))
            self.depth = [(r, s, c) for r, s in taps for c in range(a.c)]
            self.left = lambda m, k: self.x(m[0], m[1] * a.sh - a.top + k[0], m[2] * a.sw - a.left + k[1], k[2])
            self.right = lambda k, o: self.w(*k, o)
            self.out = lambda m: self.y(*m, 0)
        elif direction == "input_grad":
            h0, w0 = divmod(z, a.sw)
            self.rows = [(n, h, w) for n in range(a.n) for h in range(h0, a.h, a.sh) for w in range(w0, a.w, a.sw)]
            self.columns = list(range(a.c))
            reaching = [(r, s) for r, s in taps if (h0 + a.top - r) % a.sh == 0 and (w0 + a.left - s) % a.sw == 0]
            self.depth = [(r, s, o) for r, s in reaching for o in range(a.o)]
            self.left = lambda m, k: self.y(m[0], (m[1] + a.top - k[0]) // a.sh, (m[2] + a.left - k[1]) // a.sw, k[2])
            self.right = lambda k, c: self.w(k[0], k[1], c, k[2])
            self.out = lambda m: self.x(*m, 0)
        else:
            self.rows, self.columns = [(r, s, c) for r, s in taps for c in range(a.c)], list(range(a.o))
            self.depth = outputs
            self.left = lambda m, k: self.x(k[0], k[1] * a.sh - a.top + m[0], k[2] * a.sw - a.left + m[1], m[2])
            self.right = lambda k, o: self.y(*k, o)
            self.out = lambda m: z * len(self.rows) * a.o + self.w(*m, 0)
        self.begin, self.end = 0, len(self.depth)
        if direction == "weight_grad":
            self.begin, self.end = z * pixels, min((z + 1) * pixels, len(self.depth))

    def x(self, n, h, w, c):
        a = self.size
        return ((n * a.h + h) * a.w + w) * a.c + c if 0 <= h < a.h and 0 <= w < a.w else -1

    def y(self, n, p, q, o):
        a = self.size
        return ((n * a.p + p) * a.q + q) * a.o + o if 0 <= p < a.p and 0 <= q < a.q else -1

    def w(self, r, s, c, o):
        a = self.size
        return ((r * a.kw + s) * a.c + c) * a.o + o

    def at(self, side, index, k):
        """Row (side 0) or column (side 1) `index`, place k of the depth; zeros outside."""
        across = (self.rows, self.columns)[side]
        if not (0 <= index < len(across) and self.begin <= k < self.end):
            return -1
        return self.left(across[index], self.depth[k]) if side == 0 else self.right(self.depth[k], across[index])


def follow(library, direction, size, z, pixels, side, walk):
    """What the loaders do: extents of the product, where its rows are stored, and the addresses of the walk."""
    a = size
    x, w, y = a.n * a.h * a.w * a.c, a.kh * a.kw * a.c * a.o, a.n * a.p * a.q * a.o
    one, other = {"forward": (x, w), "input_grad": (y, w), "weight_grad": (x, y)}[direction]
    arrays = [np.zeros(count) for count in (one, other)]
    steps = walk[3]
    extent, offsets = np.zeros(4, np.int64), np.full(max(a.n * a.h * a.w, a.n * a.p * a.q, w), -1, np.int64)
    found = np.full((steps, EACH), -2, np.int64)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, arrays[0])]
    numbers, path = np.array(size, np.int32), np.array(walk, np.int32)
    answers = [ctypes.c_void_p(array.ctypes.data) for array in (extent, offsets, found)]
    library.loaders(
        DIRECTIONS.index(direction), ctypes.c_void_p(numbers.ctypes.data), *pointers, z, pixels, side,
        ctypes.c_void_p(path.ctypes.data), *answers,
    )  # fmt: skip
    return extent, offsets, found


@st.composite
def sizes(draw):
    n, h, w, c, o = (draw(st.integers(1, top)) for top in (2, 7, 7, 9, 9))
    kh, kw = (draw(st.integers(1, 5) | st.just(16)) for _ in range(2))  # 16: the largest kernel
    sh, sw = (draw(st.integers(1, 3)) for _ in range(2))
    (top, bottom), (left, right) = ((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
    h, w = max(h, kh - top - bottom), max(w, kw - left - right)
    p, q = (h + top + bottom - kh) // sh + 1, (w + left + right - kw) // sw + 1
    return ConvSize(n, h, w, c, o, kh, kw, p, q, sh, sw, top, left)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=sizes(), data=st.data())
def test_every_address_is_the_definitions(library, direction, side, size, data):
    products = {"forward": 1, "input_grad": size.sh * size.sw, "weight_grad": 3}[direction]
    z = data.draw(st.integers(0, products - 1), "phase or part")
    pixels = data.draw(st.integers(1, size.n * size.p * size.q), "pixels a part")
    twin = Twin(direction, size, z, pixels)
    across = (twin.rows, twin.columns)[side]
    first, offset = data.draw(st.integers(0, len(across) + 3), "first"), data.draw(st.integers(0, 8), "depth")
    step = data.draw(st.sampled_from([4, 8, 16, 32]), "step")
    steps = (twin.end - twin.begin) // step + 2  # and on past the end
    walk = (first, twin.begin + offset, step, max(steps, 1))
    extent, offsets, found = follow(library, direction, size, z, pixels, side, walk)
    assert extent.tolist() == [twin.begin, twin.end, len(twin.rows), len(twin.columns)]
    assert offsets[: len(twin.rows)].tolist() == [twin.out(m) for m in twin.rows]
    if twin.begin >= twin.end or not twin.rows:
        return
    for i in range(len(found)):
        for k in range(EACH):
            index = first + k * APART
            # Past the last row of a weight gradient's left side the loader may read on in x: those rows are not stored.
            if direction != "weight_grad" or side == 1 or index < len(across):
                assert found[i, k] == twin.at(side, index, walk[1] + i * step), (i, k)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=sizes())
def test_phases_of_an_input_gradient_share_out_the_image(library, size):
    """Each pixel is stored by one phase, and each of its taps is visited there: as many products as the definition has."""
    stored, taps = [], 0
    for phase in range(size.sh * size.sw):
        extent, offsets, _ = follow(library, "input_grad", size, phase, 0, 0, (0, 0, 4, 1))
        rows = offsets[: extent[2]].tolist()
        stored += rows
        taps += len(rows) * int(extent[1]) // size.o
    assert sorted(stored) == list(range(0, size.n * size.h * size.w * size.c, size.c))
    every = [
        (h + size.top - r) % size.sh == 0 and (w + size.left - s) % size.sw == 0
        for h in range(size.h) for w in range(size.w) for r in range(size.kh) for s in range(size.kw)
    ]  # fmt: skip
    assert taps == size.n * sum(every)
    assert math.prod((size.n, size.h, size.w)) == len(stored)
