"""How machine code is read: loops, divisions inside them, loads and what waits for them."""

from __future__ import annotations

from sass import Kernel, inspect, instruction

CODE = """
    /*0000*/ I2F.U32.RP R0, R1 ;
    /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
    /*0020*/ LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
    /*0030*/ IADD3 R12, R5, R11, RZ ;
    /*0040*/ @!P0 BRA 0x70 ;
    /*0050*/ LDG.E.128 R16, desc[UR4][R2.64] ;
    /*0060*/ CALL.REL.NOINC 0x200 ;
    /*0070*/ HMMA.16816.F32 R20, R24, R26, R20 ;
    /*0080*/ STS.128 [R14], R16 ;
    /*0090*/ I2F.RP R0, R1 ;
    /*00a0*/ @P1 BRA 0x40 ;
    /*00b0*/ BRA.DIV UR6, 0x100 ;
    /*00c0*/ EXIT ;
    /*0100*/ SHFL.BFLY PT, R3, R4, 0x1, 0x1f ;
    /*0110*/ BRA 0xc0 ;
    /*0200*/ I2F.U64.RP R30, R32 ;
    /*0210*/ RET.REL.NODEC R34 0x0 ;"""


def read(code: str) -> Kernel:
    kernel = Kernel("", 90, 0, 0, 0, 0)
    inspect(kernel, [made for line in code.splitlines() if (made := instruction(line))])
    return kernel


def test_divisions_in_loops() -> None:
    """One in the loop and one in a subroutine that it calls; not that before it, and code that jumps back is none."""
    assert read(CODE).divisions == 2
    assert read(CODE.replace("@P1 BRA 0x40", "@P1 BRA 0xb0")).divisions == 0


def test_loads_in_flight() -> None:
    assert read(CODE).in_flight == 2
    assert read(CODE.replace("R5, R11, RZ", "R5, RZ, RZ")).in_flight == 2
    assert read(CODE.replace("LDG.E.128 R4", "LDG.E.64 R4")).in_flight == 1


def test_copies_in_a_row() -> None:
    """Two of them, one of them alone, and a branch between both; without products in the loop none counts."""
    lines = CODE.splitlines()
    lines[6] = "\n".join(f"    /*{at}*/ LDGSTS.E.128 [R16], desc[UR4][R2.64] ;" for at in ("0050", "0058"))
    two = "\n".join(lines)
    assert read(two).apart == 1
    assert read(two.replace("/*0058*/ LDGSTS.E.128", "/*0058*/ LDS")).apart > 10
    assert read(two.replace("/*0058*/", "/*0054*/ @P2 BRA 0x70 ;\n    /*0058*/")).apart > 10
    assert read(two.replace("HMMA.16816.F32", "FFMA")).apart == read(CODE).apart == 0


def test_loads_that_overlap_with_products() -> None:
    assert read(CODE).waited == 0
    store = CODE.splitlines()[9]
    early = CODE.replace(store, "").replace("    /*0070*/", store.replace("0080", "0064") + "\n    /*0070*/")
    assert read(early).waited == 1
