"""Winograd's tiles: how many outputs each kind has, of which products they are made, and the matrices that do it.

F(m, 3) makes m outputs of m + 2 products. At a stride of 2 the outer taps meet every other number, which makes them F(4, 2), of
5 points, and the middle tap those between: 4 products as they are. Together that is 9 points of 6 different weights, and two of
the middle tap's products go into the sum of one of F's, for the outermost points of F belong to one output alone: 7 sums. The
gradient by the input is alike, with outputs where there were inputs; its products are all summed apart.

Behind an enlargement by the nearest pixel two taps always meet the same number, so that outputs at even places have two taps,
(w0, w1 + w2), and those at odd ones others, (w0 + w1, w2): two F(4, 2) make 8 outputs of 10 products, where F(4, 3) takes 12.
The gradient by the small input adds both up, in 5 sums.

The matrices are Cook-Toom's (Lavin & Gray 2016). A tile at the border may be narrower: with fewer outputs it needs
fewer points, and these are the first of the whole tile's, so that the transformed weights are the same.
"""

from __future__ import annotations

from fractions import Fraction

from tinydiff.kernels.jit import njit

Matrix = list[list[Fraction]]
POINTS = [0, 1, -1, 2, -2]  # after infinity, which is the first
F2, F4, DOWN, UP, UP_ODD, NEAREST, NEAREST_GRAD = range(7)
"""The kinds of tile: two at stride 1; one at stride 2, and two for the gradient by its input, of which UP begins with an output
that the outer taps reach, UP_ODD with one that the middle tap does; one behind an enlargement, and one for the gradient by its
input. The outputs of UP, UP_ODD and NEAREST along an axis are an even number."""
TILE = 2, 4, 4, 8, 8, 8, 4  # outputs of a whole tile of each kind, along an axis
WEIGHTS_OF = F2, F4, DOWN, DOWN, DOWN, NEAREST, NEAREST  # the kind with the same transformed weights
_OUTER, _MIDDLE = (0, 2, 4, 5, 7), (1, 3, 6, 8)  # at stride 2, which points are F(4, 2)'s, and which the middle tap's
_SUM = 0, 0, 1, 1, 2, 3, 4, 5, 6
_WEIGHT = 0, 1, 2, 1, 3, 4, 1, 5, 1


def cook_toom(outputs: int, taps: int, tile: int) -> tuple[Matrix, Matrix, Matrix]:
    """A (outputs, n), G (n, taps) and B (n, n), with n = outputs + taps - 1, such that A[(G g) ⊙ (B d)] correlates d with g.

    G is scaled as for the points of a whole tile of `tile` outputs: with fewer, it is the first rows of that.
    """
    n = outputs + taps - 1
    points = POINTS[: n - 1]

    def product(roots: list[int]) -> list[Fraction]:
        coefficients = [Fraction(1)]
        for root in roots:  # multiplied by (x - root); lowest power first
            coefficients = [a - root * b for a, b in zip([Fraction(0), *coefficients], [*coefficients, Fraction(0)])]
        return coefficients

    def value(roots: list[int], p: int) -> Fraction:
        return sum(c * p**k for k, c in enumerate(product(roots)))  # type: ignore[return-value]

    a = [[Fraction(i == outputs - 1)] + [Fraction(p) ** i for p in points] for i in range(outputs)]
    g, b = [[Fraction(k == taps - 1) for k in range(taps)]], [product(points)]
    for p in points:
        others, scale = [q for q in points if q != p], value([q for q in POINTS[: tile + taps - 2] if q != p], p)
        g.append([Fraction(p) ** k / scale for k in range(taps)])
        b.append([c * scale / value(others, p) for c in [*product(others), Fraction(0)]])
    return a, g, b


def points(kind: int, outputs: int) -> int:
    """Products along an axis for so many outputs of a tile."""
    return (outputs + 2, outputs + 2, 2 * outputs + 1, outputs + 1, outputs + 1, outputs + 2, 2 * outputs + 2)[kind]


def sums(kind: int, outputs: int) -> int:
    """Sums of these products."""
    return (outputs + 2, outputs + 2, max(2, 2 * outputs - 1), outputs + 1, outputs + 1, outputs + 2, outputs + 1)[kind]


def weights(kind: int) -> int:
    """Transformed weights along an axis."""
    return (4, 6, 6, 6, 6, 10, 10)[kind]


count_points, count_sums, count_weights = njit(points), njit(sums), njit(weights)


@njit
def sum_of(kind, point):  # type: ignore[no-untyped-def]
    """The sum along an axis that a product goes into."""
    return _SUM[point] if kind == DOWN else point // 2 if kind == NEAREST_GRAD else point


@njit
def weight_of(kind, point):  # type: ignore[no-untyped-def]
    """The transformed weight along an axis that a product is made with."""
    return _WEIGHT[point] if kind in (DOWN, UP, UP_ODD) else point


@njit
def is_added(kind, point):  # type: ignore[no-untyped-def]
    """Whether an earlier product goes into the same sum."""
    return (kind == DOWN and (point == 1 or point == 3)) or (kind == NEAREST_GRAD and point % 2 == 1)


@njit
def is_shared(kind, point):  # type: ignore[no-untyped-def]
    """Whether an earlier product is made with the same weight."""
    return kind in (DOWN, UP, UP_ODD) and point > 1 and _WEIGHT[point] == 1


@njit
def ones(kind, outputs):  # type: ignore[no-untyped-def]
    """Where in a tile's transformed gradient along an axis all of so many outputs are as they are: the first place, and the end.

    They are in one of F's points 0 and 1; behind an enlargement half of them are in another place each.
    """
    if kind == NEAREST:
        return (2, 4) if outputs == 2 else (4, 6)
    return (1, 2) if outputs == 1 else (2, 3)


@njit
def count_inputs(kind, outputs):  # type: ignore[no-untyped-def]
    """Numbers along an axis that so many outputs are made of."""
    half, double = outputs // 2, 2 * outputs
    return (outputs + 2, outputs + 2, double + 1, half + 1, half + 1, half + 2, double + 2)[kind]


@njit
def first_input(kind, output):  # type: ignore[no-untyped-def]
    """Where the inputs of a tile begin, beside those of the first."""
    half, double = output // 2, 2 * output
    return (output, output, double, half, half, half, double)[kind]


def matrices(kind: int, outputs: int) -> tuple[Matrix, Matrix, Matrix]:
    """A (outputs, sums), G (weights, 3) and B (points, inputs) for so many outputs of a kind of tile."""
    if kind <= F4:
        return cook_toom(outputs, 3, TILE[kind])
    m = outputs if kind in (DOWN, NEAREST_GRAD) else outputs // 2
    if kind >= NEAREST:
        return _behind_enlargement(kind, m)
    to, middle_to, of, middle_of = {  # the places of F's outputs, of the middle tap's, of F's inputs and of the middle tap's
        DOWN: (range(m), range(m), range(0, 2 * m + 1, 2), range(1, 2 * m, 2)),
        UP: (range(0, 2 * m, 2), range(1, 2 * m, 2), range(m + 1), range(1, m + 1)),
        UP_ODD: (range(1, 2 * m, 2), range(0, 2 * m, 2), range(m + 1), range(m)),
    }[kind]
    shapes = (outputs, sums(kind, outputs)), (weights(kind), 3), (points(kind, outputs), of[-1] + 1)
    a, g, b = ([[Fraction(0)] * columns for _ in range(rows)] for rows, columns in shapes)
    outer_a, outer_g, outer_b = cook_toom(m, 2, 4)
    for p, k in zip(_OUTER, range(m + 1)):
        g[_WEIGHT[p]][::2] = outer_g[k]
        for j in range(m + 1):
            b[p][of[j]] = outer_b[k][j]
        for j in range(m):
            a[to[j]][sum_of.py_func(kind, p)] = outer_a[j][k]
    for p, j in zip(_MIDDLE, [m - 1, *range(m - 1)]):  # infinity is the last output's, 0 the first's
        g[_WEIGHT[p]][1] = b[p][middle_of[j]] = a[middle_to[j]][sum_of.py_func(kind, p)] = Fraction(1)
    return a, g, b


def _behind_enlargement(kind: int, m: int) -> tuple[Matrix, Matrix, Matrix]:
    """Those of NEAREST and NEAREST_GRAD, for m outputs of each of two F(m, 2). Their points take turns."""
    shapes = ((2 * m, 2 * m + 2), (10, 3), (2 * m + 2, m + 2)), ((m, m + 1), (10, 3), (2 * m + 2, 2 * m + 2))
    a, g, b = ([[Fraction(0)] * columns for _ in range(rows)] for rows, columns in shapes[kind == NEAREST_GRAD])
    half_a, _, half_b = cook_toom(m, 2, 4)
    half_g = cook_toom(4, 2, 4)[1]
    for half, taps in enumerate([((0,), (1, 2)), ((0, 1), (2,))]):
        for k in range(5):
            for row, tap in zip(half_g[k], taps):
                for t in tap:
                    g[2 * k + half][t] = row
        for k in range(m + 1):
            for j in range(m + 1):
                b[2 * k + half][j + half if kind == NEAREST else 2 * j + half] = half_b[k][j]
            for j in range(m):
                a[2 * j + half if kind == NEAREST else j][2 * k + half if kind == NEAREST else k] = half_a[j][k]
    return a, g, b


MATRICES = {
    16 * kind + m: matrices(kind, m)
    for kind, tile in enumerate(TILE)
    for m in range(1, tile + 1)
    if kind not in (UP, UP_ODD, NEAREST) or m % 2 == 0
}
"""Those for m outputs of a kind, under 16 · kind + m."""
