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
