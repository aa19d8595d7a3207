"""Networks from a config of an experiment.

The library's `Config` names its own fields in an error; here the error gets the config's key.
"""

from collections.abc import Mapping
from typing import Any

from gqa.model.config import Config
from gqa.runtime.errors import renamed_fields


def network_config(model: Mapping[str, Any], heads: Mapping[str, Any]) -> Config:
    """Return the network of a config's section `model` with the KV heads `heads`.

    Raises:
        ConfigError: naming the key of the section, such as model.d_ff.
    """
    with renamed_fields("model."):
        return Config(**model, **heads)
