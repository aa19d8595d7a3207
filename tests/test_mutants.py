"""The driver of the mutation tests: the list of mutants fits the sources, mistakes are refused."""

import pytest

from tests import mutants


def test_every_mutant_names_one_place_and_tests_that_exist():
    """`load` raises for a mutant whose text does not occur exactly once in its file."""
    everything = mutants.load()
    assert len(everything) >= 150
    tests = {test.split("::")[0] for mutant in everything for test in mutant.tests}
    assert [test for test in sorted(tests) if not (mutants.ROOT / test).is_file()] == []


def test_a_part_of_a_name_selects_mutants():
    selected = mutants.load("loss")
    assert 0 < len(selected) < len(mutants.load())
    assert all("loss" in mutant.file or "loss" in mutant.name for mutant in selected)


@pytest.mark.parametrize(("text", "count"), [("a = 3", 0), ("b = 1", 2)])
def test_a_text_that_does_not_occur_once_is_refused(text, count, tmp_path, monkeypatch):
    (tmp_path / "tests" / "mutations").mkdir(parents=True)
    (tmp_path / "module.py").write_text("a = 1\nb = 1\nb = 1\n")
    (tmp_path / "tests" / "mutations" / "some.toml").write_text(
        f'[[mutant]]\nname = "x"\nfile = "module.py"\nold = "{text}"\nnew = ""\ntests = []\n'
    )
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=f"module.py: {count} places for the mutant 'x'"):
        mutants.load()
