"""Bytes, loops, copies and communication are read from the text of compiled programs."""

import pytest

from gqa.aot import costs, hlo

# As libtpu writes it, shortened: a loop of 24 over a stack of weights, half of it in fast memory.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%taken (param_0: bf16[24,16,128], param_1: s32[]) -> bf16[1,16,128] {
  %param_0 = bf16[24,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(3)} dynamic-slice(%param_0, %param_1)
}

%put (param_0.1: bf16[64,128], param_1.1: bf16[1,128], param_2.1: s32[]) -> bf16[64,128] {
  %param_0.1 = bf16[64,128]{1,0} parameter(0)
  %param_1.1 = bf16[1,128]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  ROOT %update = bf16[64,128]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}

%turned (param_0.2: bf16[64,128]) -> bf16[128,64] {
  %param_0.2 = bf16[64,128]{1,0} parameter(0)
  ROOT %transpose = bf16[128,64]{1,0} transpose(%param_0.2), dimensions={1,0}
}

%condition (tuple.1: (s32[], bf16[24,16,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %tuple.1 = (s32[]{:T(128)}, bf16[24,16,128]{2,1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%tuple.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (tuple.2: (s32[], bf16[24,16,128])) -> (s32[], bf16[24,16,128]) {
  %tuple.2 = (s32[]{:T(128)S(6)}, bf16[24,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %number = s32[]{:T(128)S(6)} get-tuple-element(%tuple.2), index=0
  %stack = bf16[24,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%tuple.2), index=1
  %one = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(3)} fusion(%stack, %number), kind=kLoop, calls=%taken
  %sum = f32[4,128]{1,0:T(8,128)S(3)} all-reduce(%one), replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %out = (s32[]{:T(128)S(6)}, bf16[24,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%number, %stack)
}

ENTRY %main (w: bf16[24,16,128], cache: bf16[64,128], row: bf16[1,128]) -> bf16[64,128] {
  %w = bf16[24,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %cache = bf16[64,128]{1,0} parameter(1), metadata={op_name="cache[0][1]"}
  %row = bf16[1,128]{1,0} parameter(2)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (s32[]{:T(128)S(6)}, bf16[24,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %w)
  %loop = (s32[], bf16[24,16,128]{2,1,0}) while(%start), condition=%condition, body=%body
  %new = bf16[64,128]{1,0} fusion(%cache, %row, %zero), kind=kLoop, calls=%put
  %fast = (bf16[64,128]{1,0:S(3)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%new)
  %done = bf16[64,128]{1,0:S(3)} copy-done(%fast)
  %pair = (bf16[64,128]{1,0}, bf16[128,128]{1,0}) all-gather-start(%new), replica_groups={{0,1}}
  %turn = bf16[128,64]{1,0} fusion(%new), kind=kLoop, calls=%turned
  ROOT %copy = bf16[128,64]{0,1} copy(%turn)
}
"""
ROW, CACHE, LAYER = 128 * 2, 64 * 128 * 2, 16 * 128 * 2


@pytest.fixture(scope="module")
def program():
    return hlo.parse(TEXT)


def test_tiles_are_filled_up():
    (shape,) = hlo.shapes("bf16[2,9,64]{2,1,0:T(8,128)(2,1)}")
    assert shape.nbytes == 2 * 16 * 128 * 2
    (other,) = hlo.shapes("bf16[2,9,64]{1,2,0:T(8,128)(2,1)}")  # the axis of 9 is the minor one
    assert other.nbytes == 2 * 64 * 128 * 2
    (plain,) = hlo.shapes("f32[3,5]{1,0}")
    assert plain.nbytes == 60


def test_a_loop_reads_a_layer_each_time(program):
    loop = sum(
        times * costs.accessed(program, it, program.computations[where])
        for it, where, times in program.executed()
        if where == "body"
    )
    assert loop == 24 * LAYER


def test_traffic_is_what_touches_hbm(program):
    update = 2 * ROW  # the row is read and written; the cache stays
    prefetch, gather, moves = CACHE, CACHE + 2 * CACHE, 4 * CACHE
    assert costs.traffic(program) == 24 * LAYER + update + prefetch + gather + moves


def test_copies_and_transposes_of_a_size(program):
    assert [it.name for it in costs.moves(program, CACHE)] == ["turn", "copy"]
    assert costs.moves(program, CACHE + 1) == []


def test_an_array_updated_in_place_is_read_where_its_copies_are_made(program):
    """By the prefetch, the all-gather and the transpose; the update reads none of it."""
    assert costs.reads(program, ("cache[",)) == 3
    twice = TEXT.replace("all-gather-start(%new)", "all-gather-start(%new, %cache)")
    assert costs.reads(hlo.parse(twice), ("cache[",)) == 4


def test_collectives_by_kind(program):
    found = costs.collectives(program)
    assert found["all-reduce"] == (24, 24 * 8 * 128 * 4, 24 * 8 * 128 * 4 * 2 * 3 / 4)
    assert found["all-gather"] == (1, 2 * CACHE, CACHE)
    gathers = [t for t in costs.transfers(program) if t.kind == "all-gather"]
    assert gathers == [("all-gather", 1, 2 * CACHE, 2)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("source_target_pairs={{0,1}}", 2),
    ],
)
def test_groups_are_read_in_every_notation(text, size):
    assert costs.group_size(text) == size


def test_a_known_number_of_turns_comes_first(program):
    known = TEXT.replace("body=%body", 'body=%body, config={"known_trip_count":{"n":"3"}}')
    assert costs.collectives(hlo.parse(known))["all-reduce"].runs == 3


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")
