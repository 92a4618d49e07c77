"""Winograd's transforms: code for D · X · Cᵀ over vectors of channels, with as few instructions as the matrices allow.

Bound by loads and stores: there are about as many of them as additions and FMAs.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinydiff.kernels.microkernel import I64, LANES, VECTOR, Emitter, call_own
from tinydiff.kernels.winograd_tiles import DOWN, F2, F4, MATRICES, NEAREST, TILE, Matrix


def _weighted(emit: Emitter, terms: list[tuple[Fraction, Any]]) -> Any:
    """Σ coefficient · vector, in as few instructions as the coefficients allow."""
    terms = sorted((term for term in terms if term[0]), key=lambda term: abs(term[0] - 1))
    total = None
    for coefficient, value in terms:
        constant = ir.Constant(VECTOR, [float(coefficient)] * LANES)
        if total is None:
            total = value if coefficient == 1 else emit.builder.fmul(constant, value)
        elif abs(coefficient) == 1:
            total = emit.builder.fadd(total, value) if coefficient == 1 else emit.builder.fsub(total, value)
        else:
            total = emit.fma(constant, value, total)
    return total


def _opposite(first: list[Fraction], second: list[Fraction]) -> bool:
    """Whether the lists agree in some places and are each other's negative in all others."""
    return (
        first != second
        and all(abs(a) == abs(b) for a, b in zip(first, second))
        and any(a == b != 0 for a, b in zip(first, second))
    )


def _apply(emit: Emitter, matrix: Matrix, values: list[Any]) -> list[Any]:
    """matrix · values; points ±p give pairs of columns or rows that share their sums."""
    columns = [list(column) for column in zip(*matrix)]
    terms: list[list[tuple[Fraction, Any]]] = [[] for _ in matrix]
    rest = list(range(len(values)))
    while rest:
        j = rest.pop(0)
        k = next((k for k in rest if _opposite(columns[j], columns[k])), None)
        if k is None:
            for row, entry in zip(terms, columns[j]):
                row.append((entry, values[j]))
            continue
        rest.remove(k)
        total, difference = emit.builder.fadd(values[j], values[k]), emit.builder.fsub(values[j], values[k])
        for row, a, b in zip(terms, columns[j], columns[k]):
            row.append((a, total if a == b else difference))
    results: list[Any] = [None] * len(matrix)
    for i, row in enumerate(terms):
        k = next((k for k in range(i + 1, len(matrix)) if results[k] is None and _opposite(matrix[i], matrix[k])), None)
        if results[i] is not None:
            continue
        if k is None or [v for _, v in row] != [v for _, v in terms[k]]:
            results[i] = _weighted(emit, row)
            continue
        even = _weighted(emit, [a for a, b in zip(row, terms[k]) if a[0] == b[0]])
        odd = _weighted(emit, [a for a, b in zip(row, terms[k]) if a[0] != b[0]])
        results[i], results[k] = emit.builder.fadd(even, odd), emit.builder.fsub(even, odd)
    return results


def transform(name: str, matrices: dict[int, Matrix], *, edges: bool = False, final: bool = False) -> Any:
    """An intrinsic that computes D · X · Cᵀ for a rectangle X of vectors (LANES channels at a time), D and C of the matrices.

    Its arguments are (which is D, which is C, source, row stride, column stride, row bits, column bits, lane bits) and (target,
    row stride, column stride, lane bits, bias, residual). `edges`: source vectors outside the bits are taken as 0 and not read.
    `final`: bias and residual (0: none; laid out as the target) are added, and only the lanes of the bits are written. Else bits
    are ignored.
    """

    def emit_transform(matrices, builder, args):  # type: ignore[no-untyped-def]
        extent = max(max(len(matrix), len(matrix[0])) for matrix in matrices.values())
        down, across, source, s_row, s_col, s_rows, s_cols, s_lanes, target, t_row, t_col, t_lanes, bias, residual = args
        emit = Emitter(builder)
        none, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
        source, target = emit.pointer(source), emit.pointer(target)
        halfway = builder.bitcast(builder.alloca(VECTOR, extent * extent), source.type)

        def look_up(which: Any, counts: dict[int, int]) -> Any:
            found = none
            for key, count in counts.items():
                same = builder.icmp_signed("==", which, ir.Constant(I64, key))
                found = builder.select(same, ir.Constant(I64, count), found)
            return found

        def along(which: Any, repeats: Any, load: Any, store: Any) -> None:
            """Multiply the chosen matrix with `repeats` lists of vectors."""
            entry, done = builder.block, builder.append_basic_block("done")
            choice = builder.switch(which, done)
            for key, matrix in matrices.items():
                loop = builder.append_basic_block("loop")
                choice.add_case(ir.Constant(I64, key), loop)
                builder.position_at_end(loop)
                r = builder.phi(I64)
                for i, value in enumerate(_apply(emit, matrix, load(len(matrix[0]), r))):
                    store(value, i, r)
                after = builder.add(r, one)
                builder.cbranch(builder.icmp_signed("<", after, repeats), loop, done)
                r.add_incoming(none, entry)
                r.add_incoming(after, loop)
            builder.position_at_end(done)

        def load_column(size: int, r: Any) -> list[Any]:
            places = [emit.at(source, builder.add(emit.times(i, s_row), builder.mul(r, s_col))) for i in range(size)]
            if not edges:
                return [emit.load(at) for at in places]
            inside = builder.select(builder.trunc(builder.lshr(s_cols, r), ir.IntType(1)), s_lanes, none)
            bits = [builder.trunc(builder.lshr(s_rows, ir.Constant(I64, i)), ir.IntType(1)) for i in range(size)]
            return [emit.masked_load(at, emit.mask(builder.select(bit, inside, none))) for at, bit in zip(places, bits)]

        def store_column(value: Any, i: int, r: Any) -> None:
            emit.store(value, emit.at(halfway, emit.times(LANES, builder.add(ir.Constant(I64, i * extent), r))))

        def load_row(size: int, r: Any) -> list[Any]:
            row = emit.at(halfway, emit.times(LANES * extent, r))
            return [emit.load(emit.at(row, LANES * j)) for j in range(size)]

        if final:
            bias, has_bias = emit.optional(bias, t_lanes, source)
            add, lanes = emit.masked_load(bias, emit.mask(has_bias)), emit.mask(t_lanes)
            given = builder.icmp_signed("!=", residual, none)
            residual, has_residual = emit.optional(residual, t_lanes, source)

        def store_row(value: Any, j: int, r: Any) -> None:
            offset = builder.add(builder.mul(r, t_row), emit.times(j, t_col))
            if final:
                more = emit.masked_load(emit.at(residual, builder.select(given, offset, none)), emit.mask(has_residual))
                emit.masked_store(emit.add(emit.add(value, add), more), emit.at(target, offset), lanes)
            else:
                emit.store(value, emit.at(target, offset))

        along(down, look_up(across, {key: len(matrix[0]) for key, matrix in matrices.items()}), load_column, store_column)
        along(across, look_up(down, {key: len(matrix) for key, matrix in matrices.items()}), load_row, store_row)

    @intrinsic
    def run(
        typingctx, down, across, source, s_row, s_col, s_rows, s_cols, s_lanes, target, t_row, t_col, t_lanes, bias, residual
    ):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            # A function for each kind: with all in one, LLVM made the loops of each half as fast again.
            done = builder.append_basic_block("done")
            choice = builder.switch(builder.udiv(args[0], ir.Constant(I64, 16)), done)
            for kind in sorted({key // 16 for key in matrices}):
                block = builder.append_basic_block("kind")
                choice.add_case(ir.Constant(I64, kind), block)
                builder.position_at_end(block)
                own = {key: matrix for key, matrix in matrices.items() if key // 16 == kind}
                call_own(builder, f"{name}_{kind}", args, partial(emit_transform, own))
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14), codegen

    return run


def _transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix)]


_WHOLE = {16 * kind + tile: MATRICES[16 * kind + tile] for kind, tile in enumerate(TILE)}
_TRAINED = F2, F4, DOWN, NEAREST  # the others are for gradients by inputs
image_to_v = transform("image", {key: b for key, (_, _, b) in _WHOLE.items()})
image_edge_to_v = transform("image_edge", {key: b for key, (_, _, b) in MATRICES.items()}, edges=True)
m_to_pixels = transform("pixels", {key: a for key, (a, _, _) in MATRICES.items()}, final=True)
gradient_to_d = transform(
    "gradient", {key: _transposed(a) for key, (a, _, _) in MATRICES.items() if key // 16 in _TRAINED}, edges=True
)
weights_to_u = transform("weights", {key: g for key, (_, g, _) in _WHOLE.items() if key // 16 in _TRAINED})
sums_to_weights = transform(
    "weights_grad", {key: _transposed(g) for key, (_, g, _) in _WHOLE.items() if key // 16 in _TRAINED}, final=True
)
