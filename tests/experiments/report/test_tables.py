"""Numbers have the unit and the digits that a reader needs; tables are valid Markdown."""

import pytest

from experiments.report import tables


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (tables.count, 999, "999"),
        (tables.count, 1000, "1.00K"),
        (tables.count, 77_000_000, "77.0M"),
        (tables.count, 11.13e9, "11.1B"),
        (tables.size, 1023, "1023 B"),
        (tables.size, 1024, "1.00 KiB"),
        (tables.size, 256 * 1024, "256 KiB"),
        (tables.size, 1.5 * 1024**3, "1.50 GiB"),
        (tables.seconds, 1.5234e-5, "15.2 us"),
        (tables.seconds, 1.5234e-3, "1.52 ms"),
        (tables.seconds, 0.9994, "999 ms"),
        (tables.seconds, 1.0, "1.00 s"),
        (tables.seconds, 123.4, "123 s"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(write, value, text):
    assert write(value) == text


def test_a_bar_in_a_cell_is_no_column():
    table = tables.markdown(["a|b", "c"], [["1", "2"]]).splitlines()
    assert table == [r"| a\|b | c |", "| ---- | - |", "| 1    | 2 |"]


def test_a_long_first_column_is_wrapped_where_that_saves_a_block():
    rows = [["GQA-8 svd-logit", "x" * 60], ["a name of many short words", "y"]]
    assert tables.plain(["variant", "cell"], rows, 84).splitlines() == [
        "variant               cell",
        "-" * 82,
        "GQA-8 svd-logit       " + "x" * 60,
        "a name of many short  y",
        "  words",
    ]
    assert tables.plain(["variant", "cell"], rows, 78).count("cell") == 1


def test_a_table_wider_than_the_page_becomes_several_that_fit():
    """Each repeats the first column; a long cell, which is wrapped, makes no table of its own."""
    header = ["variant", *(f"column {i}" for i in range(8)), "last"]
    row = ["GQA-8", *(f"{i}: 24.0 [22.5, 25.5] (none)" for i in range(8)), "long " * 40]
    parts = [part.splitlines() for part in tables.markdown(header, [row]).split("\n\n")]
    cells = [[line.strip("| ").split(" | ") for line in lines] for lines in parts]
    assert [[cell.strip() for cell in rows[0]] for rows in cells] == [
        ["variant", *(f"column {i}" for i in range(5))],
        ["variant", *(f"column {i}" for i in range(5, 8)), "last"],
    ]
    assert all(rows[2][0].strip() == "GQA-8" for rows in cells)
    narrow = ["variant", *(f"c{i}" for i in range(20))]
    assert "\n\n" not in tables.markdown(narrow, [["1"] * 21])
