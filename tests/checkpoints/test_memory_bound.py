"""A long run takes no more memory, files and handles at its end than at its beginning."""

import gc

import psutil

from tests.support import toy

LEAK = 2**20  # bytes a checkpoint: freed memory that an allocator keeps is less, a leak is more


def test_memory_files_and_handles_are_flat(tmp_path):
    """Of 2000 steps with 40 checkpoints, after 500 to warm up."""
    process, seen = psutil.Process(), {}

    def watch(step):
        if step % 10 == 0:
            gc.collect(0)
            seen[step] = process.memory_info().rss, process.num_fds()

    toy.fit(tmp_path, 2000, 50, alive=watch)
    # The least of 500 steps, because a checkpoint that is being saved takes memory and files of its
    # own. Between the two windows lie 20 checkpoints: what a leak of each adds up to is compared,
    # and not a share of the memory that the libraries take.
    early, late = (
        [min(column) for column in zip(*(seen[s] for s in range(a, a + 501, 10)), strict=True)]
        for a in (500, 1500)
    )
    assert late[0] - early[0] < 20 * LEAK
    assert late[1] <= early[1] + 10  # a leak of one a checkpoint would be 20
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert {"1950", "2000"} <= set(kept)
    assert len(kept) <= 3  # the last two and the best
    assert len(list((tmp_path / "events").iterdir())) == 1
