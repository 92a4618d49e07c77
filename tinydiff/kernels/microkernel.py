"""The innermost loop of every product here: a tile of C += A·B held in vector registers, written as LLVM IR.

Numba can't keep an array of accumulators in registers, so `gemm_tile` emits the loop itself: rows × vectors accumulators as phi
nodes, and for each step of k one broadcast of A per row and `vectors` loads of B. Bound by the two FMA units (one load per FMA
or fewer); LLVM lowers the vectors to AVX-512, AVX2 or NEON. Everything takes addresses (int64), so that one compilation serves
every array, and partial vectors are masked, so that nothing outside the arrays is touched.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _registers() -> tuple[int, int, int, int]:
    """Floats in a vector, rows of the largest tile, rows of a transposed one and vectors across both, for this processor."""
    chosen = numba.config.CPU_FEATURES  # "" for a generic processor
    features = (llvmlite.binding.get_host_cpu_features().flatten() if chosen is None else chosen).split(",")
    if "+avx512f" in features:
        return 16, 14, 12, 2  # 28 and 24 accumulators of 32 registers
    if "+avx2" in features or "+fma" in features:
        return 8, 6, 4, 2  # 12 of 16
    return 4, 8, 8, 2  # NEON: 16 of 32, latency 4 on up to 4 pipes


LANES, ROWS, COLUMNS, VECTORS = _registers()
REST = 4  # rows of the transposed tile that finishes what the larger one leaves; divides COLUMNS
WIDTH = LANES * VECTORS  # columns of a tile, and of a packed panel of B
VECTOR = ir.VectorType(F32, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
LINE = 64  # bytes in a cache line


def _float(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


class Emitter:
    """The few vector instructions that the kernels are made of, on an llvmlite builder. Offsets and strides are in floats."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        module = self.builder.module
        found = module.globals.get(name)
        return found or ir.Function(module, ir.FunctionType(result, arguments), name)

    def pointer(self, address: Any) -> Any:
        return self.builder.inttoptr(address, F32.as_pointer())

    def at(self, base: Any, offset: Any) -> Any:
        if isinstance(offset, int):
            offset = ir.Constant(I64, offset)
        return self.builder.gep(base, [offset])

    def times(self, count: int, stride: Any) -> Any:
        return self.builder.mul(ir.Constant(I64, count), stride)

    def broadcast(self, pointer: Any) -> Any:
        one = self.builder.insert_element(ir.Constant(VECTOR, ir.Undefined), self.builder.load(pointer), ir.Constant(I32, 0))
        return self.builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))

    def load(self, pointer: Any) -> Any:
        value = self.builder.load(self.builder.bitcast(pointer, VECTOR.as_pointer()))
        value.align = 4
        return value

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, VECTOR.as_pointer())).align = 4

    def bits(self, count: Any) -> Any:
        """An i64 whose lowest `count` bits (0 to 63) are set."""
        return self.builder.sub(self.builder.shl(ir.Constant(I64, 1), count), ir.Constant(I64, 1))

    def mask(self, bits: Any, vector: int = 0) -> Any:
        """Lanes of the given vector whose bits are set."""
        shifted = self.builder.lshr(bits, ir.Constant(I64, vector * LANES)) if vector else bits
        return self.builder.bitcast(self.builder.trunc(shifted, ir.IntType(LANES)), MASK)

    def optional(self, address: Any, bits: Any, instead: Any) -> tuple[Any, Any]:
        """Pointer and mask bits for an array that may be missing (address 0).

        A load with an empty mask is free only from memory that exists (else the processor takes a slow path), hence `instead`.
        """
        none = ir.Constant(I64, 0)
        given = self.builder.icmp_signed("!=", address, none)
        return self.builder.select(given, self.pointer(address), instead), self.builder.select(given, bits, none)

    def masked_load(self, pointer: Any, mask: Any) -> Any:
        """Lanes outside the mask are 0 and their memory isn't touched."""
        where = self.builder.bitcast(pointer, VECTOR.as_pointer())
        load = self.function(f"llvm.masked.load.v{LANES}f32.p0", VECTOR, [where.type, I32, MASK, VECTOR])
        return self.builder.call(load, [where, ir.Constant(I32, 4), mask, _float(0.0)])

    def masked_store(self, value: Any, pointer: Any, mask: Any) -> None:
        where = self.builder.bitcast(pointer, VECTOR.as_pointer())
        store = self.function(f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), [VECTOR, where.type, I32, MASK])
        self.builder.call(store, [value, where, ir.Constant(I32, 4), mask])

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, LANES), lanes))

    def prefetch(self, pointer: Any) -> None:
        where = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        prefetch = self.function("llvm.prefetch.p0", ir.VoidType(), [where.type, I32, I32, I32])
        self.builder.call(prefetch, [where, *(ir.Constant(I32, value) for value in (0, 3, 1))])  # to read, keep, data

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(self.function(f"llvm.fma.v{LANES}f32", VECTOR, [VECTOR] * 3), [a, b, c])


def call_own(builder: Any, name: str, args: list[Any], emit: Any) -> None:
    """Calls a function of that name that is not inlined, and that `emit(builder, args)` writes where the module has none yet.

    Inside a large kernel, LLVM runs out of registers: products in Winograd's forward kernel spilled so many accumulators that
    they ran at three quarters of their speed. Internal, so that arguments which are constants in all of a kernel are folded.
    """
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64] * len(args)), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        own = ir.IRBuilder(function.append_basic_block("start"))
        emit(own, function.args)
        own.ret_void()
    builder.call(function, args)


@intrinsic
def transpose(typingctx, source, s_stride, target, t_stride):  # type: ignore[no-untyped-def]
    """Writes the square of LANES × LANES floats at `source` transposed to `target`; strides between rows."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, s_stride, target, t_stride = args
        emit = Emitter(builder)
        rows = [emit.load(emit.at(emit.pointer(source), emit.times(i, s_stride))) for i in range(LANES)]
        distance = 1
        while distance < LANES:  # exchange the off-diagonal quarters of blocks of twice that size
            upper = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
            lower = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
            for i in range(LANES):
                if not i & distance:
                    pair = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = emit.shuffle(*pair, upper), emit.shuffle(*pair, lower)
            distance *= 2
        for i, row in enumerate(rows):
            emit.store(row, emit.at(emit.pointer(target), emit.times(i, t_stride)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def accumulate(typingctx, target, source, count):  # type: ignore[no-untyped-def]
    """Adds the first `count` (0 to LANES) floats at `source` to those at `target`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        target, source, mask = emit.pointer(args[0]), emit.pointer(args[1]), emit.mask(emit.bits(args[2]))
        emit.masked_store(emit.add(emit.masked_load(target, mask), emit.masked_load(source, mask)), target, mask)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def gemm_tile(rows: int, vectors: int, *, transposed: bool = False, scattered: bool = False) -> Any:
    """An intrinsic (a, lda, a_step, offsets, b, ldb, segments, length, bias, initial, ld_initial, c, ldc, columns) for one tile:

        C[m, n] = bias[n] + initial[m, n] + Σ_s Σ_k A[s, m, k] · B[s·length + k, n]    m < rows, n < columns ≤ vectors·LANES

    A[s, m, k] lies at a + s·a_step + m·lda + k, or at a + s·a_step + m + k·lda if transposed, or at a + s·a_step + offsets[m] +
    k·lda if transposed and scattered (`offsets` is the address of int32 numbers). bias or initial 0 means none.
    B is read in whole vectors. Addresses are integers, steps and strides are in floats, segments and length are at least 1.
    """
    name = f"tile_{rows}x{vectors}{'_transposed' * transposed}{'_scattered' * scattered}"

    @intrinsic
    def tile(typingctx, a, lda, a_step, offsets, b, ldb, segments, length, bias, initial, ld_initial, c, ldc, columns):  # type: ignore[no-untyped-def]
        def emit_tile(builder, args):  # type: ignore[no-untyped-def]
            a, lda, a_step, offsets, b, ldb, segments, length, bias, initial, ld_initial, c, ldc, columns = args
            emit = Emitter(builder)
            zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
            wanted = emit.bits(columns)
            masks = [emit.mask(wanted, j) for j in range(vectors)]
            start = []
            a, b = emit.pointer(a), emit.pointer(b)
            table = builder.inttoptr(offsets, I32.as_pointer())

            def from_table(m: int) -> Any:
                return builder.sext(builder.load(builder.gep(table, [ir.Constant(I64, m)])), I64)

            at_row = [from_table(m) if scattered else m if transposed else emit.times(m, lda) for m in range(rows)]
            a_ahead = emit.at(a, builder.mul(length, lda) if transposed else emit.times(rows, lda))
            bias, has_bias = emit.optional(bias, wanted, b)
            biases = [emit.masked_load(emit.at(bias, j * LANES), emit.mask(has_bias, j)) for j in range(vectors)]
            alone, loading, entry = builder.block, builder.append_basic_block("loading"), builder.append_basic_block("entry")
            builder.cbranch(builder.icmp_signed("!=", initial, zero), loading, entry)
            builder.position_at_end(loading)
            loaded = []
            for m in range(rows):
                row = emit.at(emit.pointer(initial), emit.times(m, ld_initial))
                loaded += [emit.add(emit.masked_load(emit.at(row, j * LANES), masks[j]), biases[j]) for j in range(vectors)]
            builder.branch(entry)
            builder.position_at_end(entry)
            for value, bias in zip(loaded, biases * rows):
                phi = builder.phi(VECTOR)
                phi.add_incoming(value, loading)
                phi.add_incoming(bias, alone)
                start.append(phi)

            outer, inner = builder.append_basic_block("segment"), builder.append_basic_block("k")
            next_segment, done = builder.append_basic_block("next"), builder.append_basic_block("done")
            builder.branch(outer)

            builder.position_at_end(outer)
            s, a_now, b_now = builder.phi(I64), builder.phi(F32.as_pointer()), builder.phi(F32.as_pointer())
            outer_sums = [builder.phi(VECTOR) for _ in start]
            builder.branch(inner)

            builder.position_at_end(inner)
            k, b_row = builder.phi(I64), builder.phi(F32.as_pointer())
            sums = [builder.phi(VECTOR) for _ in start]
            columns_of_b = [emit.load(emit.at(b_row, j * LANES)) for j in range(vectors)]
            a_column = emit.at(a_now, builder.mul(k, lda) if transposed else k)
            # The rows after this tile's, in 1×1 convolutions and products: they become 1.2 times as fast.
            emit.prefetch(emit.at(a_ahead, builder.mul(k, lda if transposed else ir.Constant(I64, rows))))
            updated = []
            for m in range(rows):
                scalar = emit.broadcast(emit.at(a_column, at_row[m]))
                updated += [emit.fma(scalar, columns_of_b[j], sums[m * vectors + j]) for j in range(vectors)]
            k_next, b_next = builder.add(k, one), emit.at(b_row, ldb)
            builder.cbranch(builder.icmp_signed("<", k_next, length), inner, next_segment)

            builder.position_at_end(next_segment)
            s_next, a_next = builder.add(s, one), emit.at(a_now, a_step)
            builder.cbranch(builder.icmp_signed("<", s_next, segments), outer, done)

            for phi, first, later in [
                (s, zero, s_next),
                (a_now, a, a_next),
                (b_now, b, b_next),
                *zip(outer_sums, start, updated),
            ]:
                phi.add_incoming(first, entry)
                phi.add_incoming(later, next_segment)
            for phi, first, later in [(k, zero, k_next), (b_row, b_now, b_next), *zip(sums, outer_sums, updated)]:
                phi.add_incoming(first, outer)
                phi.add_incoming(later, inner)

            builder.position_at_end(done)
            for m in range(rows):
                row = emit.at(emit.pointer(c), emit.times(m, ldc))
                for j in range(vectors):
                    emit.masked_store(updated[m * vectors + j], emit.at(row, j * LANES), masks[j])

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            call_own(builder, name, args, emit_tile)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14), codegen

    return tile
