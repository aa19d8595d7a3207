"""Addresses are refused as such, and every other name of a file is a path."""

import re
from pathlib import Path

import pytest

from gqa.runtime import checks
from gqa.runtime.errors import ConfigError

ADDRESSES = ["hf://org/model", "gs://bucket/a", "s3://bucket", "http://host/a", "HTTPS://host:1/a"]
ADDRESSES += ["file:///etc", "x-y+z.1://a"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_named_as_the_user_wrote_it(address):
    """Also where it has become a path, which has one slash in the place of two."""
    # A Path cannot tell file:///etc from file://etc.
    for path, written in ((address, address), (Path(address), address.replace(":///", "://"))):
        message = re.escape(f"folder='{written}' is a URL; mount")
        with pytest.raises(ConfigError, match=f"^{message}"):
            checks.check_local_path("folder", path)


@pytest.mark.parametrize(
    "path",
    [
        "C:/runs",
        r"C:\runs",
        "step:1",
        "a:b/c",
        "./gs:/a",
        "/data/gs://a",
        "12:/a",
        "-a:/b",
        ":/a",
        "",
    ],
)
def test_a_name_with_a_colon_is_a_path(path):
    checks.check_local_path("folder", path)
