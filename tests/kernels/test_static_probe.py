"""The probe reads machine code: its parser, loop finder and counting on hand-written listings with known answers."""

import pytest
import static_kernel_probe
from kernel_probe import amd
from kernel_probe.census import access_bytes, census, kind, mma_flop
from kernel_probe.compiler import widest_load
from kernel_probe.machines import MACHINES, occupancy
from kernel_probe.report import Report, table
from kernel_probe.sass import Instruction, find_loops, parse, resources

LISTING = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0000000402048981 */
                                                                       /* 0x000ea2000c1e1d00 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ; /* 0x01e0000004187df0 */
                                                                       /* 0x000fe20008001818 */
        /*0030*/               @P1 BRA 0x10 ;                          /* 0xfffffffc00000947 */
                                                                       /* 0x000fea000383ffff */
        /*0040*/                   EXIT ;                              /* 0x000000000000794d */
                                                                       /* 0x000fea0003800000 */
"""


def test_parse_reads_opcodes_predicates_and_control_bits():
    code = parse(LISTING)
    assert [i.opcode for i in code] == ["LDC", "LDG.E.128", "HGMMA.64x128x16.F32.BF16", "BRA", "EXIT"]
    assert [i.predicate for i in code] == ["", "@!P0", "", "@P1", ""]
    assert code[3].address == 0x30
    assert code[1].stall == (0x000EA2000C1E1D00 >> 41) & 0xF
    assert widest_load(code) == 16


def test_resources():
    text = " Function k:\n  REG:168 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:600 TEXTURE:0"
    assert resources(text) == {"registers": 168, "local": 24, "static_shared": 1024}
    assert resources("")["registers"] == 0


def program(*lines):
    """Instructions at 16-byte steps from "opcode arguments" texts; "@P0" first makes one conditional."""
    code = []
    for k, line in enumerate(lines):
        predicate, rest = (line.split(" ", 1)) if line.startswith("@") else ("", line)
        opcode, _, arguments = rest.partition(" ")
        code.append(Instruction(16 * k, opcode, arguments, predicate))
    return code


def test_loops_of_a_listing():
    assert find_loops(parse(LISTING)) == [[1, 2, 3]]


def test_nested_loops_and_out_of_line_waits():
    body = ("MOV", "MOV", "HMMA.16816.F32", "@P3 BRA 0x70", "@P0 BRA 0x20", "@P1 BRA 0x10", "EXIT")
    code = program(*body, "SYNCS", "@P2 BRA 0x70", "BRA 0x40")  # a spin-wait after the end, left by a jump back
    assert sorted(find_loops(code), key=len) == [[7, 8], [2, 3, 4, 7, 8, 9], [1, 2, 3, 4, 5, 7, 8, 9]]


def test_a_jump_into_the_middle_is_no_natural_loop():
    code = program("@P0 BRA 0x20", "MOV", "MOV", "@P1 BRA 0x10", "EXIT")
    assert find_loops(code) == []  # irreducible: the body has two entries


@pytest.mark.parametrize(
    ("opcode", "flop"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 / 4),
        ("FFMA", 0),
        ("UTCHMMA", 0),
    ],
)
def test_flop_of_a_matrix_instruction(opcode, flop):
    assert mma_flop(Instruction(0, opcode, "", "")) == flop


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDSM.16.M88.4", 16), ("LDSM.16.MT88.2", 8), ("LDS.128", 16), ("LDS", 4), ("LDS.U.64", 8), ("LDL.U8", 1),
     ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("STSM.16.M88.4", 16)],
)  # fmt: skip
def test_bytes_of_a_memory_instruction(opcode, size):
    assert access_bytes(opcode) == size


def test_census_counts_every_instruction_once():
    opcodes = ["HGMMA.64x256x16.F32", "MUFU.EX2", "FFMA", "ISETP", "LDS.128", "UMOV", "WARPGROUP.ARRIVE", "BRA", "NOP"]
    body = [Instruction(0, opcode, "", "", stall=2) for opcode in opcodes]
    counts = census(body, MACHINES[90])
    kinds = [kind(i) for i in body]
    assert kinds == ["mma", "special", "fma", "alu", "shared", "uniform", "barrier", "branch", "other"]
    assert sum(counts[k] for k in kinds) == counts["total"] == len(body)
    assert counts["stall"] == 18
    # 64x256x16 products: 2*64*256*16/4 FLOP a warp, at 4096/4 a clock
    assert counts["cycles"]["tensor"] == 128
    assert counts["cycles"]["special"] == 32 / 4
    assert counts["cycles"]["shared"] == 32 * 16 / 32
    assert counts["ceil_serial"] == round(128 / (128 + 16), 3)
    assert counts["nontensor_per_kflop"] == round(8 / 131072 * 1000, 3)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (255, 8, 0, (1, 8, "registers")),  # 65536 / (256 * 256)
        (32, 4, 0, (16, 64, "registers")),
        (168, 12, 100 * 1024, (1, 12, "registers")),
        (64, 4, 100 * 1024, (2, 8, "shared memory")),
        (64, 4, 230 * 1024, (0, 0, "shared memory")),
        (16, 1, 0, (32, 32, "CTA slots")),
    ],
)
def test_occupancy(registers, warps, shared, expected):
    assert occupancy(MACHINES[90], registers, warps, shared) == expected


AMD = """
.LBB0_1:
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tscratch_store_dword off, v1, s32
\ts_waitcnt vmcnt(0)
\ts_cbranch_scc1 .LBB0_1
\tglobal_load_ushort v1, v2, off
\ts_endpgm
    .vgpr_count:     128
    .vgpr_spill_count: 2
"""


def test_amd_assembly():
    (loop,) = amd.loops(AMD)
    assert (loop["mma"], loop["local"], loop["load"], loop["total"]) == (1, 1, 1, 5)
    assert amd.figure(AMD, "vgpr_count") == 128
    assert amd.figure(AMD, "vgpr_spill_count") == 2
    assert amd.widest_load(AMD) == 16


def sample(**changes):
    loops = [{"mma": 4, "flop": 10.0, "total": 30, "nontensor_per_kflop": 0.4}, {"mma": 4, "flop": 10.0, "total": 20}]
    figures = ["k", "sm_90", 8, 2, 200, 0, 0, 1024, 1, 8, "registers", {"total": 99}, loops]
    return Report(*figures, **changes)


def test_main_loop_is_the_unmasked_one_and_figures_survive_json():
    assert sample().main["total"] == 20
    assert Report.from_dict(sample(widest_load=16).as_dict()) == sample(widest_load=16)
    assert table([sample()]).count("\n") == 2


def test_bounds():
    missed = static_kernel_probe.missed
    assert missed(sample(), "spills<=0") is None
    assert missed(sample(), "ctas_per_sm>=1") is None
    assert "got 200" in missed(sample(), "registers<=100")
    assert missed(sample(), "main.total<=20") is None
    assert "got None" in missed(sample(), "main.nosuch<=1")
    with pytest.raises(ValueError, match="KEY"):
        missed(sample(), "spills=0")


def test_files_without_specs_are_named(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        static_kernel_probe.load_specs(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="no SPECS"):
        static_kernel_probe.load_specs(str(tmp_path / "empty.py"))
