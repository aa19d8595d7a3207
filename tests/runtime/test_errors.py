"""Errors that the user can correct are told apart from defects."""

from gqa.runtime.errors import is_disk_full


def test_a_full_disk_is_known_from_what_led_to_an_error():
    def chain(first):
        try:
            try:
                raise first
            except Exception as error:
                raise RuntimeError("the save failed") from error
        except RuntimeError as error:
            return error

    for error in (
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: No space left on device]"),
    ):
        assert is_disk_full(error)
        assert is_disk_full(chain(error))
    assert not is_disk_full(chain(OSError(2, "No such file or directory")))
    assert not is_disk_full(None)
