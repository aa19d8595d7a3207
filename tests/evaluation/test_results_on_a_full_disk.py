"""Result records on a full disk: of several, all are appended or none."""

import pytest

from gqa.evaluation import results
from tests.support import small_disk
from tests.support.small_disk import assert_full, fill

RECORD = dict.fromkeys(("run", "stage", "metric", "unit", "commit", "device", "time"), "a")
RECORD |= {"value": 1, "task": None, "variant": {}}
RECORD |= dict.fromkeys(("stage_key", "low", "high", "n"))


@pytest.fixture
def disk(tmp_path):
    with small_disk.mounted(tmp_path / "disk", "64k") as folder:
        yield folder


@pytest.mark.parametrize("first", [0, 1, 100])
def test_of_several_results_all_or_none_are_appended(disk, first):
    path = disk / "results.jsonl"
    results.append(path, [RECORD] * first)
    ballast = fill(disk)
    before = path.read_bytes()
    many = [RECORD | {"value": i} for i in range(150)]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as error:
            results.append(path, many)
        assert_full(error, path)
        assert path.read_bytes() == before
    ballast.unlink()
    results.append(path, many)
    assert results.read(path) == [RECORD] * first + many
