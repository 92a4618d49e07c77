"""The static figures of the CUDA kernels: what is read from the compiler's words, and that each gate refuses what it should.

No compiler is needed here; `python -m tests.cudacheck.figures` compares the stored table with what NVIDIA's makes of csrc/.
"""

import re
from collections import Counter
from dataclasses import replace

import pytest
from click.testing import CliRunner

from tests.cudacheck import figures, sass, toolchain
from tests.cudacheck.occupancy import LIMITS, blocks_at_once, occupancy
from tinydiff.cudasim.build import csrc

VERSION, STORED = figures.read(figures.TABLE.read_text())

# A loop in a loop, as nvdisasm prints it; then a second kernel.
LISTING = """\
.text._Z4tinyIfEvPKfPfii:
        /*0030*/              @!P0 MOV R5, RZ ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   IMAD.WIDE.U32 R2, R2, R3, c[0x0][0x160] ;
        /*00c0*/                   LDG.E.128 R8, [R2.64] ;
        /*00c8*/                   LDG.E.64.CONSTANT R8, [R2.64] ;
        /*00d0*/               @P1 LDG.E R8, [R2.64] ;
        /*00f0*/                   FFMA R8, R8, R9, R10 ;
        /*0100*/                   STS [R7.X4], R8 ;
        /*0108*/              @!PT LDS RZ, [RZ] ;
        /*0110*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0120*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0150*/                   LDS.128 R8, [UR4] ;
        /*0170*/                   UIADD3 UR4, UR4, 0x10, URZ ;
        /*0190*/                   FFMA R5, R8, R5, R9 ;
        /*01a0*/                   FFMA R5, R10, R5, R11 ;
        /*01b0*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*01d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*01f0*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0230*/                   STG.E [R2.64], R5 ;
        /*0240*/                   EXIT ;
.L_x_4:
        /*0250*/                   BRA `(.L_x_4);
        /*0260*/                   NOP;
.text._Z5otherPf:
        /*0000*/                   HMMA.1688.F32.TF32 R4, R4, R8, R4 ;
        /*0010*/                   EXIT ;
"""


def test_loops_of_machine_code():
    code = sass.functions(LISTING)
    assert list(code) == ["_Z4tinyIfEvPKfPfii", "_Z5otherPf"]
    outer, inner = sass.loops(*code["_Z4tinyIfEvPKfPfii"])
    assert (outer.depth, inner.depth) == (1, 2)
    assert inner.mix == Counter({"LDS.128": 1, "UIADD3": 1, "FFMA": 2, "BRA": 1})
    assert outer.mix["FFMA"] == 1, "the inner loop's are not the outer one's"
    assert [outer.mix[kind] for kind in ("LDG.128", "LDG.64", "LDG", "STS", "LDS", "NOP", "BAR")] == [1, 1, 1, 1, 0, 1, 2]
    assert sass.describe(outer) == "11: 2 BAR, 1 FFMA, 1 LDG, 1 LDG.128, 1 LDG.64, 1 NOP, 1 STS, 3 other"
    assert outer.size == 11
    assert sass.describe(inner) == "5: 2 FFMA, 1 LDS.128, 2 other"
    assert sass.loops(*code["_Z5otherPf"]) == []
    assert sass.describe(sass.hottest([])) == ""


def loop(depth, **mix):
    return sass.Loop(0, 0, depth, Counter(mix))


def test_the_hottest_loop():
    """A prologue of many instructions and none that multiplies is not it, nor is a shallow loop beside a deep one."""
    product, prologue = loop(1, HMMA=16, LDS=40), loop(2, IADD3=50)
    assert sass.hottest([prologue, product]) == product
    assert sass.hottest([loop(1, FFMA=100), loop(2, FFMA=20)]).depth == 2
    assert sass.hottest([loop(1, LDG=5), loop(1, LDG=7)]).size == 7


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tinyIfEvPKfPfii' for 'sm_80'
ptxas info    : Function properties for _Z4tinyIfEvPKfPfii
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5otherPf' for 'sm_80'
ptxas info    : Function properties for _Z5otherPf
    48 bytes stack frame, 52 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0]
"""
PTX = """\
.visible .entry _Z4tinyIfEvPKfPfii(
	.param .u64 _Z4tinyIfEvPKfPfii_param_0
)
.maxntid 64, 1, 1
.minnctapersm 1
{
	// begin inline asm
	// shared bytes: 256
	// end inline asm
}
.visible .entry _Z5otherPf(
	.param .u64 _Z5otherPf_param_0
)
{
}
"""


def test_resources_of_kernels():
    assert toolchain.resources(LOG, PTX) == {
        "_Z4tinyIfEvPKfPfii": toolchain.Resources(registers=34, spills=0, local=0, shared=256, threads=64),
        "_Z5otherPf": toolchain.Resources(registers=24, spills=108, local=48, shared=1024, threads=0),
    }
    with pytest.raises(RuntimeError, match="said nothing of _Z5otherPf"):
        toolchain.resources(LOG[: LOG.index("ptxas info    : Compiling entry function '_Z5other")], PTX)


@pytest.mark.parametrize(
    ("sm", "threads", "registers", "shared", "blocks", "filled"),
    [
        # 8 warps of 128 x 32 registers: 16 warps have all 65,536.
        ("80", 256, 128, 16896, 2, 16 / 64),
        ("75", 256, 128, 16896, 2, 16 / 32),
        # 34 registers are given as 40: 1,280 a warp, so 51 warps, of which whole fours: 48.
        ("80", 256, 34, 0, 6, 48 / 64),
        # One register more than 64, and 1,024 threads need more than there are.
        ("90", 1024, 64, 0, 1, 32 / 64),
        ("90", 1024, 65, 0, 0, 0),
        # 48 KB and the system's 1 KB: twice in 100 KB, three times in 164 KB, four times in 228 KB.
        ("86", 128, 32, 48 << 10, 2, 8 / 48),
        ("80", 128, 32, 48 << 10, 3, 12 / 64),
        ("90", 128, 32, 48 << 10, 4, 16 / 64),
        # Blocks of one warp: 32 at once, 24 on sm_89 and sm_120, 16 on sm_75 and sm_86.
        ("100", 32, 16, 0, 32, 32 / 64),
        ("120", 32, 16, 0, 24, 24 / 48),
        ("89", 32, 16, 0, 24, 24 / 48),
        ("86", 32, 16, 0, 16, 16 / 48),
        ("75", 32, 16, 0, 16, 16 / 32),
        # No block may have more than 64 KB on sm_75, 99 on sm_86, 163 on sm_80, 227 on sm_90.
        ("75", 128, 32, (64 << 10) + 1, 0, 0),
        ("86", 128, 32, 99 << 10, 1, 4 / 48),
        ("80", 128, 32, 163 << 10, 1, 4 / 64),
        ("80", 128, 32, 164 << 10, 0, 0),
        ("90", 128, 32, 227 << 10, 1, 4 / 64),
    ],
)
def test_occupancy(sm, threads, registers, shared, blocks, filled):
    assert blocks_at_once(sm, threads, registers, shared) == blocks
    assert occupancy(sm, threads, registers, shared) == filled


def test_the_table_is_read_as_it_is_written(monkeypatch):
    monkeypatch.setattr(toolchain, "version", lambda: VERSION)
    assert figures.read(figures.table(STORED)) == (VERSION, STORED)
    assert figures.table(STORED) == figures.TABLE.read_text()


def test_the_table_holds_every_kernel_on_every_architecture():
    written = set()
    for path in [*csrc().glob("*.cu"), *csrc().glob("*.h")]:
        if path.name != "launch.h":
            written |= set(re.findall(r"\bKERNEL(?:_BOUNDS\([^;{]*?\))?\s+(\w+)\(", path.read_text()))
    kernels = {f.kernel for f in STORED}
    assert {name.partition("<")[0] for name in kernels} == written
    assert Counter(f.sm for f in STORED) == dict.fromkeys(LIMITS, len(kernels))


def test_stored_figures_keep_all_promises():
    assert figures.broken(STORED) == []


def planted(kernel, sm, **changes):
    """The stored figures of one kernel, with something wrong."""
    [one] = [f for f in STORED if (f.kernel, f.sm) == (kernel, sm)]
    return figures.broken([replace(one, **changes)], [p for p in figures.PROMISES if re.fullmatch(p.pattern, kernel)])


SIMT, TENSOR = "igemm_simt<float, Tile<128, 128, 8, 8, 8>, true, 0>", "igemm_tc<float, 128, 0>"


@pytest.mark.parametrize(
    ("kernel", "changes", "what"),
    [
        (SIMT, {"spills": 8}, "spilled"),
        (SIMT, {"local": 16}, "local memory"),
        (SIMT, {"threads": 0}, "declared"),
        (SIMT, {"occupancy": 0}, "fits"),
        (SIMT, {"loop": "642: 512 FFMA, 2 LDG.128, 128 other"}, "FFMA is at least 80 %"),
        (SIMT, {"loop": "600: 512 FFMA, 1 LDG.128, 1 LDG, 86 other"}, "16 bytes"),
        (SIMT, {"loop": "600: 512 FFMA, 1 LDG.128, 1 LDG.64, 86 other"}, "16 bytes"),
        (SIMT, {"loop": "600: 512 FFMA, 88 other"}, "16 bytes"),
        (TENSOR, {"loop": "257: 64 HMMA, 8 LDGSTS.128, 185 other"}, "HMMA is at least 25 %"),
        (TENSOR, {"loop": "200: 64 HMMA, 7 LDGSTS.128, 1 LDGSTS, 128 other"}, "16 bytes"),
    ],
)
def test_broken_promises_are_noticed(kernel, changes, what):
    assert planted(kernel, "80") == []
    [said] = planted(kernel, "80", **changes)
    assert what in said and kernel in said and "sm_80" in said


def test_promises_are_of_kernels_that_exist_and_of_architectures_that_can():
    assert planted(TENSOR, "75", loop="10: 10 other") == []
    promise = figures.Promise("igemm_tensor<.*>", "something", lambda f: True)
    assert "no such kernel" in figures.broken(STORED, [promise])[0]


def test_differences_from_the_table():
    found = [f for f in STORED if f.sm == "80"]
    assert figures.differences(found, STORED) == []
    other = [replace(found[0], registers=found[0].registers + 1), *found[1:]]
    assert figures.differences(other, STORED) == [
        f"{found[0].kernel} on sm_80: registers was {found[0].registers}, and is {found[0].registers + 1}"
    ]
    assert figures.differences(found[1:], STORED) == [f"{found[0].kernel} on sm_80 is in the table only"]
    assert figures.differences([*found, replace(found[0], kernel="new")], STORED) == ["new on sm_80 is not in the table"]


def command(monkeypatch, version, found):
    monkeypatch.setattr(toolchain, "version", version)
    monkeypatch.setattr(figures, "compute", lambda architectures: found)
    return CliRunner().invoke(figures.main, [])


def test_the_command(monkeypatch):
    found = [f for f in STORED if f.sm == "80"]
    done = command(monkeypatch, lambda: VERSION, found)
    assert done.exit_code == 0 and "nothing amiss" in done.output
    done = command(monkeypatch, lambda: VERSION, [replace(found[0], spills=4), *found[1:]])
    assert done.exit_code == 1 and "spills was 0, and is 4" in done.output and "no register is spilled" in done.output
    done = command(monkeypatch, lambda: "12.4.131", found)
    assert done.exit_code == 1 and f"of nvcc {VERSION}, and here is 12.4.131: pip install '.[cuda-build]'" in done.output


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    toolchain.tool.cache_clear()
    with pytest.raises(toolchain.Missing, match=r"nvidia-cuda-nvcc is not installed: pip install '\.\[cuda-build\]'"):
        toolchain.tool("nvcc")
    done = CliRunner().invoke(figures.main, [])
    assert done.exit_code == 1 and "Error: the package nvidia-cuda-nvcc is not installed" in done.output
