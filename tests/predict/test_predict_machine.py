"""The machine on small pieces of code, written for the purpose."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from bench.predict import integers
from bench.predict.machine import REGION, Machine, UnknownCodeError
from bench.predict.sass import Instruction, class_of, multiply_adds, parse

WORDS = (0, 1, 5, 0x7F, 0x8000, 0x12345678, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF)


def code(*lines: str) -> list[Instruction]:
    printed = []
    for line in lines:
        printed.append(line if line.endswith(":") else f"        /*0000*/   {line} ;")
    return parse("\n".join(printed))


def machine(
    *lines: str, constants: dict[int, int] | None = None, programs: int = 1, tickets: object = None
) -> Machine:
    threads = 32
    special = {
        "SR_TID.X": np.tile(np.arange(threads, dtype=np.int64), programs),
        "SR_CTAID.X": np.repeat(np.arange(programs, dtype=np.int64), threads),
        "SR_LANEID": np.tile(np.arange(32, dtype=np.int64), programs),
    }
    return Machine(code(*lines), constants or {}, special, programs, threads, tickets)


def test_code_is_read() -> None:
    found = code(
        ".L_x_0:",
        "@!P1 LDG.E.128 R4, desc[UR6][R2.64+0x10]",
        "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0",
        "HMMA.16816.F32 R4, R8, R12.reuse, R4",
        "HMMA.1688.F32.TF32 R4, R8, R12, R4",
        "@P0 BRA `(.L_x_0)",
    )
    assert found[0].guard == ("P1", True)
    assert found[0].nbytes == 16
    assert found[2].operands == ("R4", "R8", "R12", "R4")
    assert [multiply_adds(one) for one in found] == [0, 64 * 128 * 16 // 4, 16 * 8 * 16, 16 * 8 * 8, 0]
    assert found[4].target == 0
    assert [class_of(one.name) for one in found] == ["memory", "mma", "mma", "mma", "branch"]
    with pytest.raises(ValueError, match="no instruction"):
        parse("nothing")
    with pytest.raises(ValueError, match="L_x_9"):
        code("BRA `(.L_x_9)")


def test_a_loop_counts_as_often_as_it_runs() -> None:
    """Its bound is an argument; ``R0`` goes up in steps of 64."""
    lines = (
        "MOV R0, RZ",
        ".L_x_0:",
        "FFMA R4, R4, R5, R6",
        "IADD3 R0, R0, 0x40, RZ",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
        "@!P0 BRA `(.L_x_0)",
        "EXIT",
    )
    for bound, times in ((1, 1), (64, 1), (65, 2), (2048, 32)):
        counted = machine(*lines, constants={0x210: bound}).run()
        assert counted.executed == [1, times, times, times, times, 1]
        assert not counted.undecided


def test_programs_go_their_own_ways_and_meet_again() -> None:
    """Program 0 of 4 does more than the others; a branch inside of it is each thread's own."""
    counted = machine(
        "S2R R0, SR_CTAID.X",
        "S2R R1, SR_TID.X",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "@P0 BRA `(.L_x_1)",
        "ISETP.LT.AND P1, PT, R1, 0x10, PT",
        "@P1 BRA `(.L_x_1)",
        "IADD3 R2, R1, 0x1, RZ",
        ".L_x_1:",
        "NOP",
        "@!P0 EXIT",
        "NOP",
        "EXIT",
        programs=4,
    ).run()
    assert counted.executed == [4, 4, 4, 4, 1, 1, 1, 4, 4, 3, 3]


def test_masks_and_addresses_of_stores() -> None:
    """Threads below a bound store four bytes each, 8 apart; then 16 bytes by one thread, and none."""
    base = 3 << REGION
    counted = machine(
        "LDC.64 R2, c[0x0][0x210]",
        "S2R R0, SR_TID.X",
        "IMAD.WIDE R4, R0, 0x8, R2",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x218], PT",
        "@!P0 STG.E desc[UR4][R4.64+0x4], R9",
        "ISETP.NE.AND P1, PT, R0, 0x3, PT",
        "@!P1 STG.E.128 desc[UR4][R2.64], R8",
        "@!PT STG.E desc[UR4][R2.64], R8",
        "@!P0 LDG.E R7, desc[UR4][R2.64]",
        "@!P0 IADD3 R7, R7, 0x1, RZ",
        "EXIT",
        constants={0x210: base & 0xFFFFFFFF, 0x214: base >> 32, 0x218: 10},
    ).run()
    assert counted.stored == {2: 10 * 4 + 16}
    assert counted.written == 3 * 32 + 32  # 80 bytes lie in three sectors
    assert counted.read == 32  # all threads of a warp read one word: one sector
    assert counted.read_tensors == {2}
    assert counted.unknown == 0


def test_copies_whose_predicate_is_false_read_nothing() -> None:
    base = 1 << REGION
    counted = machine(
        "LDC.64 R2, c[0x0][0x210]",
        "S2R R0, SR_TID.X",
        "IMAD.WIDE.U32 R4, R0, 0x10, R2",
        "ISETP.LT.AND P0, PT, R0, 0x4, PT",
        "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64], P0",
        "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64], !PT",
        "EXIT",
        constants={0x210: base & 0xFFFFFFFF, 0x214: base >> 32},
    ).run()
    assert counted.read == 64
    assert counted.executed == [1] * 7


def test_what_depends_on_data_is_said() -> None:
    """A loop that waits counts once; what a branch might skip is counted; addresses from memory are apart."""
    counted = machine(
        ".L_x_0:",
        "LDG.E.STRONG.GPU R0, desc[UR4][R2.64]",
        "ISETP.LT.AND P0, PT, R0, 0x5, PT",
        "@P0 BRA `(.L_x_0)",
        "@P0 BRA `(.L_x_1)",
        "IMAD.WIDE R4, R0, 0x8, R2",
        "STG.E desc[UR4][R4.64], R0",
        ".L_x_1:",
        "EXIT",
    ).run()
    assert counted.executed == [1] * 7
    assert counted.undecided == {2, 3}
    assert counted.unknown == 2 * 32 * 4
    assert counted.stored == {}
    with pytest.raises(UnknownCodeError, match="CALL"):
        machine("CALL.REL.NOINC `(.L_x_1)", ".L_x_1:", "EXIT").run()
    with pytest.raises(UnknownCodeError, match="no end"):
        machine("NOP").run()


def test_an_unknown_number_comes_back_when_it_is_written_again() -> None:
    """Half of the threads overwrite a float with a number and may use it; the others' is not known."""
    base = 1 << REGION
    lines = (
        "LDC.64 R2, c[0x0][0x210]",
        "S2R R0, SR_TID.X",
        "ISETP.LT.AND P0, PT, R0, 0x10, PT",
        "FADD R6, R7, R8",
        "@P0 IMAD R6, R0, 0x4, RZ",
        "{guard}IMAD.WIDE R4, R6, 0x1, R2",
        "{guard}STG.E desc[UR4][R4.64], R9",
        "EXIT",
    )
    constants = {0x210: base & 0xFFFFFFFF, 0x214: base >> 32}
    known = machine(*(line.format(guard="@P0 ") for line in lines), constants=constants).run()
    assert (known.stored, known.unknown) == ({0: 64}, 0)
    mixed = machine(*(line.format(guard="") for line in lines), constants=constants).run()
    assert (mixed.stored, mixed.unknown) == ({}, 128)


def test_a_ticket_goes_through_shared_memory() -> None:
    """One thread draws it, all read it: program p stores p + 1 times."""
    base = 1 << REGION
    tickets = np.repeat(np.arange(3, dtype=np.int64), 32)
    counted = machine(
        "LDC.64 R2, c[0x0][0x210]",
        "S2R R0, SR_TID.X",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R9",
        "@!P0 STS [UR6], R5",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R6, [UR6]",
        ".L_x_0:",
        "@!P0 STG.E desc[UR4][R2.64], R6",
        "ISETP.GT.AND P1, PT, R6, RZ, PT",
        "IADD3 R6, R6, -0x1, RZ",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        constants={0x210: base & 0xFFFFFFFF, 0x214: base >> 32},
        programs=3,
        tickets=tickets,
    )
    counted._registers["UR6"] = 0x400
    found = counted.run()
    assert found.executed[7] == 1 + 2 + 3
    assert not found.undecided


def results(line: str, **registers: int) -> SimpleNamespace:
    """Registers and predicates after one instruction."""
    one = machine(line, "EXIT")
    one._registers.update({name: value for name, value in registers.items() if name[0] in "RU"})
    one._predicates.update({name: bool(value) for name, value in registers.items() if name[0] == "P"})
    one.run()
    return SimpleNamespace(**one._registers, **one._predicates)


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def test_arithmetic_is_that_of_32_bits() -> None:
    for a, b in itertools.product(WORDS, WORDS):
        found = results("IADD3 R0, P0, R1, R2, RZ", R1=a, R2=b)
        assert ((a + b) % 2**32, a + b >= 2**32) == (found.R0, found.P0)
        found = results("IADD3 R0, P0, R1, -R2, RZ", R1=a, R2=b)
        assert ((a - b) % 2**32, a >= b) == (found.R0, found.P0)
        assert (a + b + 1) % 2**32 == results("IADD3.X R0, R1, R2, RZ, P1, !PT", R1=a, R2=b, P1=1).R0
        assert (a * b + a) % 2**32 == results("IMAD R0, R1, R2, R1", R1=a, R2=b).R0
        assert a * b >> 32 == results("IMAD.HI.U32 R0, R1, R2, RZ", R1=a, R2=b).R0
        product = signed(a) * signed(b)
        found = results("IMAD.WIDE R4, R1, R2, RZ", R1=a, R2=b)
        assert product % 2**64 == (found.R5 << 32 | found.R4)
        assert a ^ b == results("LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", R1=a, R2=b).R0
        assert a & b == results("LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT", R1=a, R2=b).R0
        assert min(a, b, key=signed) == results("VIMNMX R0, R1, R2, PT", R1=a, R2=b).R0
        assert max(a, b, key=signed) == results("VIMNMX R0, R1, R2, !PT", R1=a, R2=b).R0
        found = results("ISETP.LT.AND P0, P1, R1, R2, PT", R1=a, R2=b)
        assert (signed(a) < signed(b), signed(a) >= signed(b)) == (found.P0, found.P1)
        assert (a >= b) == results("ISETP.GE.U32.AND P0, PT, R1, R2, PT", R1=a, R2=b).P0
        found = results("ISETP.GT.AND.EX P0, PT, R1, R2, PT, P2", R1=a, R2=b, P2=1)
        assert (signed(a) >= signed(b)) == found.P0
        whole = b << 32 | a
        for shift in (0, 1, 7, 31):
            assert ((a << shift) + b) % 2**32 == results(f"LEA R0, R1, R2, {shift:#x}", R1=a, R2=b).R0
            assert (a << shift) % 2**32 == results(f"SHF.L.U32 R0, R1, {shift:#x}, RZ", R1=a).R0
            assert a >> shift == results(f"SHF.R.U32.HI R0, RZ, {shift:#x}, R1", R1=a).R0
            assert (signed(a) >> shift) % 2**32 == results(f"SHF.R.S32.HI R0, RZ, {shift:#x}, R1", R1=a).R0
            assert (whole << shift >> 32) % 2**32 == results(
                f"SHF.L.U64.HI R0, R1, {shift:#x}, R2", R1=a, R2=b
            ).R0
            assert (whole >> shift) % 2**32 == results(f"SHF.R.U64 R0, R1, {shift:#x}, R2", R1=a, R2=b).R0
            want = (a >> (32 - shift) if shift else 0) + b
            assert want % 2**32 == results(f"LEA.HI R0, R1, R2, RZ, {shift:#x}", R1=a, R2=b).R0
        assert whole >> 40 == results("SHF.R.U64 R0, R1, 0x28, R2", R1=a, R2=b).R0


def test_single_words() -> None:
    for a in WORDS:
        assert abs(signed(a)) == results("IABS R0, R1", R1=a).R0
        assert bin(a).count("1") == results("POPC R0, R1", R1=a).R0
        assert a & 15 == results("SGXT.U32 R0, R1, 0x4", R1=a).R0
        assert ((a & 15) - (16 if a & 8 else 0)) % 2**32 == results("SGXT R0, R1, 0x4", R1=a).R0
        assert a == results("PRMT R0, R1, 0x3210, R2", R1=a, R2=7).R0
        assert 0xABCD0000 | a & 0xFFFF == results("PRMT R0, R1, 0x7610, R2", R1=a, R2=0xABCD1234).R0
        assert integers.leading(a) == (a.bit_length() - 1) % 2**32
    found = results("PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x8", P1=1, P2=0)
    assert found.P0 is False
    found = results("P2R R0, PR, RZ, 0x6", **{f"P{i}": i == 1 for i in range(7)})
    assert found.R0 == 2


def test_division_by_a_reciprocal_is_exact() -> None:
    """As ptxas writes ``a / b`` of unsigned words: an estimate by a float, corrected twice."""
    lines = (
        "I2F.U32.RP R5, R2",
        "MUFU.RCP R5, R5",
        "IADD3 R6, R5, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R6",
        "MOV R8, RZ",
        "IADD3 R7, RZ, -R3, RZ",
        "IMAD R7, R7, R2, RZ",
        "MOV R9, R3",
        "IMAD.HI.U32 R3, R3, R7, R8",
        "IMAD.HI.U32 R3, R3, R1, RZ",
        "IADD3 R4, RZ, -R3, RZ",
        "IMAD R4, R4, R2, R1",
        "ISETP.GE.U32.AND P0, PT, R4, R2, PT",
        "@P0 IADD3 R4, R4, -R2, RZ",
        "@P0 IADD3 R3, R3, 0x1, RZ",
        "ISETP.GE.U32.AND P1, PT, R4, R2, PT",
        "@P1 IADD3 R3, R3, 0x1, RZ",
        "EXIT",
    )
    for a, b in ((0, 7), (100, 7), (4607, 128), (2**31 - 1, 3), (2**32 - 1, 1), (12345678, 1000)):
        one = machine(*lines)
        one._registers.update(R1=a, R2=b)
        one.run()
        assert one._registers["R3"] == a // b
