"""Which texts count as duplicates: the same words, or more than half of the runs of 8 words."""

import pytest

from gqa.data.duplicates import SeenTexts


@pytest.mark.parametrize(
    ("shared", "repetition"), [(13, ""), (14, "near"), (19, "near"), (20, "exact")]
)
def test_near_is_more_than_half_of_the_ngrams(shared, repetition):
    """Twenty words have 13 runs of 8; 13 shared words have 6 of them, 14 have 7."""
    seen = SeenTexts()
    first = [f"a{i}" for i in range(20)]
    assert seen.repeats(" ".join(first)) == ""
    assert (
        seen.repeats(" ".join(first[:shared] + [f"b{i}" for i in range(20 - shared)])) == repetition
    )


def test_texts_too_short_for_ngrams_repeat_only_exactly():
    seen = SeenTexts()
    assert seen.repeats("one two three") == ""
    assert seen.repeats("one two three four") == ""
    assert seen.repeats("one  two\nthree") == "exact"
