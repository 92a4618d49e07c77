"""The CUDA simulator: what it computes, and that every one of its checks notices the bug it is there for."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tinydiff import cudasim

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HEADER = '#include "launch.h"\n'

BUGS = """
struct Storage { float tile[64]; float4 wide[16]; };

KERNEL void reverse(const float* x, float* y, int bug) {
    SHARED(Storage, s);
    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    if (bug != 12) s.tile[t] = ld(x + i);
    if (bug != 1) BARRIER();
    const float value = s.tile[63 - t];
    if (bug == 2) s.tile[t] = 0;                       // write after read
    if (bug == 3 && t == 5) return;
    if (bug == 4) { if (t < 32) BARRIER(); else BARRIER(); }
    BARRIER();
    if (bug == 4) { if (t < 32) { BARRIER(); } else {
                    BARRIER(); } }
    st(y + i, value);
    if (bug == 5 && blockIdx.x < 3) st(y + i + 64, 1.0f);  // the next block's
    if (bug == 6) y[i + 192] = 1.0f;                   // a plain store past the end
    if (bug == 7 && t == 1) store128(y + i, make_float4(0, 0, 0, 0));
    if (bug == 8) st(const_cast<float*>(x) + i, 0.0f);
    if (bug == 9 && t < 31) WARP_SYNC(0xffffffffu);
    if (bug == 10 && t < 32) SHFL_XOR(t < 16 ? 0xffffu : 0xffff0000u, value, 16);
    if (bug == 11 && t < 32) { if (t % 2) WARP_SYNC(0xffffffffu); else
                               WARP_SYNC(0xffffffffu); }
    if (bug == 13) st(y + (t ? i : i + 1), 1.0f);      // two threads, one address
    if (bug == 14 && t == 0) sts128(&s.wide[16], make_float4(0, 0, 0, 0));
    if (bug == 15 && t < 32) BALLOT(1u << t | 1u, true);
    if (bug == 16) st(y + i, ld(y + (i + 64) % 256));  // what another block writes
    if (bug == 17 && t == 0) SHFL(3u, value, 1);
}

KERNEL void last_block_wins(float* y) { if (threadIdx.x == 0) y[0] = blockIdx.x; }

KERNEL void order(float* y) {
    if (threadIdx.x == 0) st(y, 1.0f);
    atomicAdd(y + 1, threadIdx.x == 7 ? 1e8f : threadIdx.x == 9 ? -1e8f : 1.0f);
}
"""


@pytest.fixture(scope="module")
def bugs():
    return cudasim.compile(HEADER + BUGS)


def run(kernel, *arguments, **launch):
    with pytest.raises(cudasim.KernelError) as error:
        kernel(*arguments, **launch)
    return error.value.findings


def test_clean_kernel(bugs):
    x = np.arange(256, dtype=np.float32)
    y = np.zeros_like(x)
    bugs.reverse.check(x, y, 0, grid=4, block=64, shared=512)
    np.testing.assert_array_equal(y.reshape(4, 64), x.reshape(4, 64)[:, ::-1])


@pytest.mark.parametrize("schedule", cudasim.SCHEDULES)
@pytest.mark.parametrize(
    ("bug", "kind", "where"),
    [
        (1, "race", ["s.tile[63 - t]", "s.tile[t] = ld"]),
        (2, "race", ["bug == 2", "s.tile[63 - t]"]),
        (3, "divergence", []),
        (4, "divergence", []),
        (5, "blocks", ["st(y + i"]),
        (6, "bounds", ["bug == 6"]),
        (7, "alignment", ["bug == 7"]),
        (8, "read-only", ["bug == 8"]),
        (9, "warp", ["bug == 9"]),
        (10, "warp", ["bug == 10"]),
        (11, "warp", ["WARP_SYNC"]),
        (12, "uninitialised", ["s.tile[63 - t]"]),
        (13, "race", ["bug == 13", "st(y + i, value)"]),
        (14, "bounds", ["bug == 14"]),
        (15, "warp", ["bug == 15"]),
        (16, "blocks", ["bug == 16", "st(y + i"]),
        (17, "warp", ["bug == 17"]),
    ],
)
def test_each_bug_is_noticed_whatever_the_order(bugs, bug, kind, where, schedule):
    x = np.arange(256, dtype=np.float32)
    findings = run(bugs.reverse, x, np.zeros_like(x), bug, grid=4, block=64, shared=512, schedule=schedule, seed=bug)
    found = [f for f in findings if f.kind == kind]
    assert found, [str(f) for f in findings]
    lines = (HEADER + BUGS).splitlines()
    places = {line for f in found for line in (f.where, f.other) if line}
    texts = [lines[int(place.rpartition(":")[2]) - 1] for place in places]
    if where:
        assert any(part in text for part in where for text in texts), texts


def test_two_blocks_at_one_address(bugs):
    findings = run(bugs.last_block_wins, np.zeros(1, np.float32), grid=2, block=1)
    assert {f.kind for f in findings} == {"blocks"}


def test_a_result_that_depends_on_the_order(bugs):
    y = np.zeros(2, np.float32)
    bugs.order(y, grid=1, block=64)  # one order alone finds nothing
    with pytest.raises(cudasim.KernelError, match="y differs between the forward schedule and") as error:
        bugs.order.check(np.zeros(2, np.float32), grid=1, block=64)
    assert error.value.findings[0].kind == "order"


def test_limits(bugs):
    x = np.zeros(256, np.float32)
    for launch, message in [
        ({"grid": 1, "block": 64, "shared": 100}, "shared memory takes 512 bytes; it was launched with 100"),
        ({"grid": 1, "block": 2048, "shared": 512}, "a GPU takes 1024"),
        ({"grid": 1, "block": 64, "shared": 100 << 10, "architecture": 86}, "sm_86 has 101376"),
        ({"grid": (1, 70000), "block": 64, "shared": 512}, "65535"),
    ]:
        (finding,) = run(bugs.reverse, x, x.copy(), 0, **launch)
        assert finding.kind == "limit"
        assert message in finding.message


def test_shared_memory_and_guards_in_the_fast_build():
    """Without seeing plain accesses, damage is found afterwards, at the guards, and stale values are poison."""
    fast = cudasim.compile(HEADER + BUGS, races=False)
    x = np.arange(256, dtype=np.float32)
    findings = run(fast.reverse, x, np.zeros_like(x), 6, grid=4, block=64, shared=512)
    assert [f.kind for f in findings] == ["bounds"]
    assert "y was written 0 bytes after its end" in findings[0].message
    y = np.zeros_like(x)
    fast.reverse(x, y, 12, grid=4, block=64, shared=512)
    assert np.isnan(y).all()
    y = np.zeros_like(x)
    fast.reverse(x, y, 1, grid=4, block=64, shared=512)  # the first half reads what has not been written
    np.testing.assert_array_equal(np.isnan(y.reshape(4, 64)), [[True] * 32 + [False] * 32] * 4)


WARPS = """
struct Storage { float box[32]; };
KERNEL void neighbours(float* y, int missing) {
    SHARED(Storage, s);
    const int t = threadIdx.x;
    s.box[t] = t * t;
    if (!missing) WARP_SYNC(0xffffffffu);
    else SHFL_XOR(0xffffffffu, 0, 1);  // exchanges values, orders no memory
    st(y + t, s.box[t ^ 1]);
}
KERNEL void halves(float* y) {
    SHARED(Storage, s);
    const int t = threadIdx.x;
    const unsigned half = t < 16 ? 0xffffu : 0xffff0000u;
    for (int round = 0; round < (t < 16 ? 3 : 5); ++round) {
        s.box[t] = t + round;
        WARP_SYNC(half);
        float sum = s.box[t ^ 1] + s.box[t];
        WARP_SYNC(half);
        st(y + t, sum);
    }
}
KERNEL void shuffles(const int* x, int* y) {
    const int t = threadIdx.x, v = ld(x + t);
    st(y + t, SHFL_XOR(~0u, v, 5));
    st(y + 32 + t, SHFL_DOWN(~0u, v, 3));
    st(y + 64 + t, SHFL_UP(~0u, v, 4));
    st(y + 96 + t, SHFL(~0u, v, t / 4));
    st(y + 128 + t, int(BALLOT(~0u, v % 3 == 0)));
}
"""


@pytest.fixture(scope="module")
def warps():
    return cudasim.compile(HEADER + WARPS)


def test_warp_synchronisation_orders_memory_and_a_shuffle_does_not(warps):
    y = np.zeros(32, np.float32)
    warps.neighbours.check(y, 0, grid=1, block=32, shared=128)
    np.testing.assert_array_equal(y, (np.arange(32) ^ 1) ** 2)
    findings = run(warps.neighbours, y, 1, grid=1, block=32, shared=128)
    assert {f.kind for f in findings} == {"race"}


def test_halves_of_a_warp_go_their_own_way(warps):
    y = np.zeros(32, np.float32)
    warps.halves.check(y, grid=1, block=32, shared=128)
    lane = np.arange(32)
    np.testing.assert_array_equal(y, lane + (lane ^ 1) + 2 * np.where(lane < 16, 2, 4))


def test_shuffles(warps):
    x = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)
    y = np.zeros(160, np.int32)
    warps.shuffles.check(x, y, grid=1, block=32)
    lane = np.arange(32)
    np.testing.assert_array_equal(y[:32], x[lane ^ 5])
    np.testing.assert_array_equal(y[32:64], x[np.where(lane + 3 < 32, lane + 3, lane)])
    np.testing.assert_array_equal(y[64:96], x[np.where(lane >= 4, lane - 4, lane)])
    np.testing.assert_array_equal(y[96:128], x[lane // 4])
    np.testing.assert_array_equal(y[128:].view(np.uint32), sum(1 << int(l) for l in lane if x[l] % 3 == 0))


ASYNC = """
struct Storage { alignas(16) float tile[2][128]; };
KERNEL void copy(const float* x, float* y, int n, int bug) {
    SHARED(Storage, s);
    const int t = threadIdx.x;
    for (int stage = 0; stage < 2; ++stage) {
        const int i = stage * 128 + t * 4;
        cp_async16(&s.tile[stage][t * 4], x + (bug == 3 ? i + 4 : i), i < n);
        cp_async_commit();
    }
    if (bug == 1) cp_async_wait<2>(); else cp_async_wait<1>();
    if (bug != 2) BARRIER();
    st(y + t, s.tile[0][127 - t]);
    if (bug == 4) st(y + t, s.tile[1][t * 4]);
    cp_async_wait<0>();
    BARRIER();
    st(y + 32 + t, s.tile[1][127 - t]);
}
"""


@pytest.fixture(scope="module")
def copies():
    return cudasim.compile(HEADER + ASYNC)


def test_asynchronous_copies(copies):
    x = np.arange(200, dtype=np.float32)
    y = np.zeros(64, np.float32)
    copies.copy.check(x, y, 200, 0, grid=1, block=32, shared=1024)
    padded = np.concatenate([x, np.zeros(56, np.float32)])
    np.testing.assert_array_equal(y, np.concatenate([padded[127:95:-1], padded[255:223:-1]]))


@pytest.mark.parametrize("name", ["load", "store", "header"])
@pytest.mark.parametrize("at", [2**40, -(2**40), 2**60])
def test_a_wild_index_is_a_finding_and_no_crash(name, at):
    kernels = cudasim.compile("""#include "launch.h"
KERNEL void load(const float* x, float* y, long long at) { st(y + threadIdx.x, x[at]); }
KERNEL void store(const float* x, float* y, long long at) { y[at] = x[threadIdx.x]; }
KERNEL void header(const float* x, float* y, long long at) { st(y + threadIdx.x, ld(x + at)); }
""")
    x = np.zeros(32, np.float32)
    with pytest.raises(cudasim.KernelError, match=r"bounds at kernel\.cu:.* at an address outside every array"):
        getattr(kernels, name)(x, np.zeros_like(x), at, grid=1, block=32)


@pytest.mark.parametrize(("bug", "kind"), [(1, "async"), (2, "race"), (3, "bounds"), (4, "async")])
@pytest.mark.parametrize("late", [True, False])
def test_each_bug_of_asynchronous_copies_is_noticed(copies, bug, kind, late):
    x = np.arange(256, dtype=np.float32)
    findings = run(copies.copy, x, np.zeros(64, np.float32), 256, bug, grid=1, block=32, shared=1024, late_copies=late)
    assert kind in {f.kind for f in findings}


def test_a_copy_that_is_not_waited_for_is_poison_in_the_fast_build():
    fast = cudasim.compile(HEADER + ASYNC, races=False)
    x, y = np.arange(256, dtype=np.float32), np.zeros(64, np.float32)
    fast.copy(x, y, 256, 1, grid=1, block=32, shared=1024, late_copies=True)
    assert np.isnan(y[0]) and not np.isnan(y[32:]).any()
    fast.copy(x, y, 256, 1, grid=1, block=32, shared=1024, late_copies=False)
    np.testing.assert_array_equal(y[:32], x[127:95:-1])


TENSOR = """
KERNEL void tf32(const unsigned* a, const unsigned* b, float* d) {
    const int t = threadIdx.x;
    uint32_t ra[4], rb[2];
    float rd[4];
    for (int i = 0; i < 4; ++i) ra[i] = ld(a + t * 4 + i), rd[i] = ld(d + t * 4 + i);
    for (int i = 0; i < 2; ++i) rb[i] = ld(b + t * 2 + i);
    mma_m16n8k8_tf32(rd, ra, rb);
    for (int i = 0; i < 4; ++i) st(d + t * 4 + i, rd[i]);
}
KERNEL void bf16(const unsigned* a, const unsigned* b, float* d) {
    const int t = threadIdx.x;
    uint32_t ra[4], rb[2];
    float rd[4];
    for (int i = 0; i < 4; ++i) ra[i] = ld(a + t * 4 + i), rd[i] = ld(d + t * 4 + i);
    for (int i = 0; i < 2; ++i) rb[i] = ld(b + t * 2 + i);
    mma_m16n8k16_bf16(rd, ra, rb);
    for (int i = 0; i < 4; ++i) st(d + t * 4 + i, rd[i]);
}
struct Matrices { uint16_t rows[32][8]; };
KERNEL void matrices(const uint16_t* x, unsigned* y, int transpose) {
    SHARED(Matrices, s);
    const int t = threadIdx.x;
    for (int j = 0; j < 8; ++j) s.rows[t][j] = ld(x + t * 8 + j);
    WARP_SYNC(~0u);
    uint32_t r[4];
    if (transpose) ldmatrix_x4_trans(r, s.rows[t]); else ldmatrix_x4(r, s.rows[t]);
    for (int i = 0; i < 4; ++i) st(y + t * 4 + i, r[i]);
}
KERNEL void rounding(const float* x, unsigned* y) {
    const int t = threadIdx.x;
    st(y + 2 * t, to_tf32(ld(x + t)));
    st(y + 2 * t + 1, pack_bf16x2(ld(x + t), -ld(x + t)));
}
"""


@pytest.fixture(scope="module")
def tensor():
    return cudasim.compile(HEADER + TENSOR)


# The fragments as the PTX manual words them: groupID = lane >> 2, threadID_in_group = lane % 4.
def fragment_a_tf32(lane, i):
    return (lane >> 2) + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def fragment_b_tf32(lane, i):
    return lane % 4 + (4 if i == 1 else 0), lane >> 2


def fragment_a_bf16(lane, i):
    return (lane >> 2) + (0 if i in (0, 1, 4, 5) else 8), (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def fragment_b_bf16(lane, i):
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def fragment_d(lane, i):
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 1)


def spread(matrix, fragment, count):
    return np.array([[matrix[fragment(lane, i)] for i in range(count)] for lane in range(32)])


@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_matrix_products_of_a_warp(tensor, kind):
    """One-hot matrices: each element of a meets each element of b where it should, and nothing else moves."""
    depth = 8 if kind == "tf32" else 16
    rng = np.random.default_rng(1)
    for _ in range(60):
        i, k, j = rng.integers(16), rng.integers(depth), rng.integers(8)
        a, b = np.zeros((16, depth), np.float32), np.zeros((depth, 8), np.float32)
        a[i, k], b[k, j] = 3.0, 5.0
        check_product(tensor, kind, a, b)
    a = rng.integers(-8, 9, (16, depth)).astype(np.float32)
    check_product(tensor, kind, a, rng.integers(-8, 9, (depth, 8)).astype(np.float32))


def check_product(tensor, kind, a, b):
    start = np.arange(128, dtype=np.float32).reshape(16, 8)
    if kind == "tf32":
        ra = spread(a, fragment_a_tf32, 4).view(np.uint32)
        rb = spread(b, fragment_b_tf32, 2).view(np.uint32)
    else:
        ra = (spread(a, fragment_a_bf16, 8).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
        rb = (spread(b, fragment_b_bf16, 4).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
    d = spread(start, fragment_d, 4)
    getattr(tensor, kind)(np.ascontiguousarray(ra), np.ascontiguousarray(rb), d, grid=1, block=32)
    np.testing.assert_array_equal(d, spread(start + a @ b, fragment_d, 4))


def test_tf32_drops_the_low_bits_of_its_operands(tensor):
    a, b = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32)
    a[:, 0], b[:, 0] = np.float32(1 + 2**-11), 1
    d = np.zeros((32, 4), np.float32)
    tensor.tf32(a.view(np.uint32), b.view(np.uint32), d, grid=1, block=32)
    np.testing.assert_array_equal(d[:, :2], 4)  # 4 products of 1 * 1


@pytest.mark.parametrize("transpose", [0, 1])
def test_ldmatrix(tensor, transpose):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    y = np.zeros((32, 4), np.uint32)
    tensor.matrices.check(x.reshape(-1), y, transpose, grid=1, block=32, shared=512)
    matrices = x.transpose(0, 2, 1) if transpose else x
    expected = matrices.reshape(4, 32, 2).transpose(1, 0, 2)  # lane l: elements 2 (l % 4), + 1 of row l / 4
    np.testing.assert_array_equal(y.view(np.uint16).reshape(32, 4, 2), expected)


def test_rounding_to_the_inputs_of_tensor_cores(tensor):
    x = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    x[:3] = 1 + 2**-11, 1 + 2**-12, 1 + 2**-8  # halves: tf32 away from zero; bf16 to even
    y = np.zeros(64, np.uint32)
    tensor.rounding(x, y, grid=1, block=32)
    tf32 = y[::2].view(np.float32)
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 10)
    np.testing.assert_array_equal(tf32, np.sign(x) * np.floor(np.abs(x) / step + 0.5) * step)
    low, high = (y[1::2] << 16).view(np.float32), (y[1::2] & 0xFFFF0000).view(np.float32)
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    np.testing.assert_array_equal(low, np.round(x / step) * step)
    np.testing.assert_array_equal(high, -low)


REQUESTS = """
struct Storage { alignas(16) float tile[32 * 36]; };
KERNEL void columns(const float* x, float* y, int pitch) {
    SHARED(Storage, s);
    const int t = threadIdx.x;
    for (int i = t; i < 32 * 36 / 4; i += 32) sts128(&s.tile[i * 4], load128(x + i * 4));
    WARP_SYNC(~0u);
    st(y + 2 * t, lds128(&s.tile[t * pitch]).x);
}
"""


def test_bank_conflicts_and_sectors():
    kernels = cudasim.compile(HEADER + REQUESTS)
    x, y = np.zeros(32 * 36, np.float32), np.zeros(64, np.float32)
    for pitch, phases in [(32, 32), (36, 4)]:  # 8 lanes a phase: all in four banks, or each in four of its own
        rows = {(r.space, r.where): r for r in kernels.columns.requests(x, y, pitch, grid=1, block=32, shared=4608)}
        by_space = {(space, where.rpartition(":")[2]): r for (space, where), r in rows.items()}
        load = by_space["shared", "9"]
        assert (load.requests, load.parts, load.least) == (1, phases, 4)
        store = by_space["global", "9"]  # every other float: 32 floats in 256 bytes
        assert (store.requests, store.parts, store.least) == (1, 8, 4)
        fill = by_space["global", "7"]
        assert (fill.requests, fill.parts, fill.least) == (9, 9 * 16, 9 * 16)


PLAIN = """
struct Storage { float tile[64]; double wide[64]; };
DEVICE float twice(const float* p) { return 2 * *p; }
KERNEL void strides(float* y, int step) {
    SHARED(Storage, s);
    const int t = threadIdx.x;
    s.tile[t] = s.tile[t + 32] = t;
    s.wide[t] = s.wide[t + 32] = t;
    WARP_SYNC(~0u);
    st(y + t, twice(&s.tile[t * step % 64]) + float(s.wide[t * step % 64]));
}
"""


@pytest.mark.parametrize("step, phases, wide", [(1, 1, 2), (2, 2, 4), (0, 1, 2)])
def test_bank_conflicts_of_plain_accesses(step, phases, wide):
    """Every other word: two a bank. The same word for all lanes: one phase, or one for each half warp if it is of 8 bytes."""
    kernel = cudasim.compile(HEADER + PLAIN).strides
    found = kernel.requests(np.zeros(32, np.float32), step, grid=1, block=32, shared=768)
    reads = {r.bytes: r for r in found if (r.space, r.access) == ("shared", "read")}
    assert (reads[4].requests, reads[4].parts) == (1, phases) and (reads[8].requests, reads[8].parts) == (1, wide)
    assert reads[4].where.endswith(":4") and reads[8].where.endswith(":11")
    writes = [r for r in found if (r.space, r.access) == ("shared", "write")]
    assert sum(r.requests for r in writes) == 4 and all(r.parts == r.least for r in writes)
    assert {r.kernel for r in found} == {"strides"}


def test_mutants():
    source = HEADER + (
        "struct Storage { float tile[64]; };\n"
        "KERNEL void f(float* y) {\n"
        "    SHARED(Storage, s);\n"
        "    s.tile[threadIdx.x] = 1;\n"
        '    if (!MUTANT(1, "neighbours read before the tile is written")) BARRIER();\n'
        "    st(y + threadIdx.x, s.tile[63 - threadIdx.x]);\n"
        "}\n"
    )
    f = cudasim.compile(source).f
    y = np.zeros(64, np.float32)
    f(y, grid=1, block=64, shared=256)
    assert "race" in {x.kind for x in run(f, y, grid=1, block=64, shared=256, mutant=1)}
    f(y, grid=1, block=64, shared=256)  # off again


def test_bad_input(bugs, tmp_path, monkeypatch):
    x = np.zeros(256, np.float32)
    launch = {"grid": 4, "block": 64, "shared": 512}
    with pytest.raises(TypeError, match="takes 3 arguments, not 2"):
        bugs.reverse(x, x, **launch)
    with pytest.raises(TypeError, match=r"x must be of float32, not float64: use x.astype\(np.float32\)"):
        bugs.reverse(x.astype(float), x, 0, **launch)
    with pytest.raises(ValueError, match="x is not contiguous"):
        bugs.reverse(np.zeros((256, 2), np.float32)[:, 0], x, 0, **launch)
    with pytest.raises(TypeError, match="bug is a int, not float"):
        bugs.reverse(x, x.copy(), 0.5, **launch)
    with pytest.raises(ValueError, match="grid must be one to three positive integers"):
        bugs.reverse(x, x.copy(), 0, grid=0, block=64)
    with pytest.raises(ValueError, match="schedule 'sideways' is none of forward, reverse"):
        bugs.reverse(x, x.copy(), 0, schedule="sideways", **launch)
    with pytest.raises(AttributeError, match="no kernel 'forward'; there are: reverse"):
        _ = bugs.forward
    with pytest.raises(cudasim.CompileError, match="undeclared_name"):
        cudasim.compile(HEADER + "KERNEL void f(float* y) {\n undeclared_name = 1; }\n")
    with pytest.raises(ValueError, match="has no kernel"):
        cudasim.compile(HEADER + "int f();\n")
    with pytest.raises(ValueError, match="takes 'Params p': only numbers and pointers"):
        cudasim.compile(HEADER + "struct Params {};\nKERNEL void f(Params p) {}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"compiles with g\+\+, which is not on the PATH: install it"):
        cudasim.compile(HEADER + BUGS)


def test_the_readme_s_example_says_what_the_readme_says():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    section = text[text.index("## CUDA kernels without a GPU") :]
    _, code, said = section.split("```")[:2] + section.split("```")[3:4]
    with pytest.raises(cudasim.KernelError) as error:
        exec(code.removeprefix("python\n"), {})
    assert str(error.value) == said.strip().removeprefix("tinydiff.cudasim.simulator.KernelError: ")
    fixed = code.removeprefix("python\n").replace("    st(y", "    BARRIER();\n    st(y")
    exec(fixed, {})
