"""What single instructions read, write and send, by hand."""

import pytest

from gqa.aot import costs, hlo

HEAD = "HloModule m\n\n"


def program(body, before=""):
    return hlo.parse(f"{HEAD}{before}ENTRY %main (a: f32[8,16]) -> f32[8,16] {{\n{body}}}\n")


A = "  %a = f32[8,16]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
SIZE, ROW = 8 * 16 * 4, 16 * 4


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%x = f32[8,16]{1,0} add(%a, %a)", 3 * SIZE),
        ("%x = f32[1,16]{1,0} slice(%a), slice={[0:1], [0:16]}", 2 * ROW),
        ("%x = f32[1,16]{1,0} dynamic-slice(%a, %i)", 2 * ROW),
        ("%x = f32[2,16]{1,0} gather(%a, %i)", 4 * ROW),
        ("%x = f32[8,16]{1,0} dynamic-update-slice(%a, %row, %i)", 2 * ROW),
        ("%x = f32[8,16]{1,0} scatter(%a, %i, %row), to_apply=%sum", 2 * ROW),
        ("%x = f32[8,16]{1,0} bitcast(%a)", 0),
        ("%x = f32[8,16]{1,0:S(1)} copy(%a)", SIZE),
        ("%x = f32[8,16]{1,0} all-gather-done(%a)", 0),
        ("%x = f32[8,16]{1,0} negate(%fast)", SIZE),
    ],
)
def test_bytes_of_an_instruction(line, moved):
    more = "  %row = f32[1,16]{1,0} parameter(2)\n  %fast = f32[8,16]{1,0:S(1)} parameter(3)\n"
    assert costs.traffic(program(f"{A}{more}  ROOT {line}\n")) == moved


@pytest.mark.parametrize(
    ("dtype", "bytes_of_16"),
    [("pred", 16), ("bf16", 32), ("f16", 32), ("f32", 64), ("f64", 128), ("s8", 16), ("u4", 8)],
)
def test_sizes_of_types(dtype, bytes_of_16):
    (shape,) = hlo.shapes(f"{dtype}[2,8]{{1,0}}")
    assert shape.nbytes == bytes_of_16
    assert shape.in_hbm


@pytest.mark.parametrize(
    ("op", "share"),
    [
        ("all-reduce", 2 * 3 / 4),
        ("all-gather", 3 / 4),
        ("all-to-all", 3 / 4),
        ("reduce-scatter", 3),
        ("collective-permute", 1),
    ],
)
def test_bytes_sent_on_a_ring_of_four(op, share):
    line = f"  ROOT %x = f32[8,16]{{1,0}} {op}(%a), replica_groups={{{{0,1,2,3}}}}\n"
    found = costs.collectives(program(A + line))
    assert found == {op: (1, SIZE, pytest.approx(share * SIZE))}
    assert [t.nbytes for t in costs.transfers(program(A + line))] == [SIZE]


def test_a_variadic_start_counts_all_of_its_results():
    body = f"""{A}  %s = (f32[8,16], f32[4,16], f32[8,16], f32[4,16]) all-reduce-start(%a, %a), \
replica_groups={{{{0,1}}}}
  ROOT %x = f32[8,16]{{1,0}} all-reduce-done(%s)
"""
    assert costs.collectives(program(body))["all-reduce"].nbytes == SIZE + SIZE // 2


NESTED = """%inner (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  ROOT %g = f32[8,16]{1,0} negate(%p)
}

%outer (p: f32[8,16]) -> f32[8,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %w = f32[8,16]{1,0} while(%q), condition=%c, body=%inner, \
config={"known_trip_count":{"n":"3"}}
}

"""


def test_loops_in_loops_multiply_and_branches_and_calls_count_once():
    loop = (
        "  ROOT %x = f32[8,16]{1,0} while(%a), condition=%c, body=%outer, "
        'config={"known_trip_count":{"n":"5"}}\n'
    )
    assert costs.traffic(program(A + loop, NESTED)) == 15 * 2 * SIZE
    call = "  ROOT %x = f32[8,16]{1,0} call(%a), to_apply=%inner\n"
    assert costs.traffic(program(A + call, NESTED)) == 2 * SIZE
    both = "  ROOT %x = f32[8,16]{1,0} conditional(%i, %a), branch_computations={%inner, %outer}\n"
    assert costs.traffic(program(A + both, NESTED)) == (1 + 3) * 2 * SIZE
