"""The files in which Orbax describes a checkpoint, read and checked before Orbax reads them.

Orbax fails on some of them with a traceback, and follows others to places outside the checkpoint.
checkpoint.py calls Orbax; stored_arrays.py checks the arrays themselves.
"""

import re
from pathlib import Path
from typing import Any

from gqa.runtime import regular_files
from gqa.runtime.errors import CheckpointError

# The file in which Orbax keeps the JSON items.
JSON = "_CHECKPOINT_METADATA"
# The file in an item's folder that describes its tree of arrays.
TREE = "_METADATA"
# Orbax's name of the class that reads an item of arrays.
HANDLER = re.compile(r"orbax\.checkpoint\.[\w.]*\.PyTree\w*Handler")


def read(step: Path) -> dict[str, Any]:
    """Return Orbax's metadata of a step.

    Raises:
        CheckpointError: if the file is missing.
        UserError: if it is not a JSON object.
    """
    path = step / JSON
    if not path.is_file():
        raise CheckpointError(f"checkpoint {step} has no {JSON}; use one that this program saved")
    return regular_files.read_json(path)


def json_item(step: Path, metadata: dict[str, Any], name: str) -> dict:
    """Return a JSON item.

    Raises:
        CheckpointError: if there is none of that name.
    """
    items = metadata.get("custom_metadata")
    if not isinstance(items, dict) or not isinstance(items.get(name), dict):
        raise CheckpointError(f"checkpoint {step} has no {name}; use one that this program saved")
    return items[name]


def check(step: Path, metadata: dict[str, Any], item: str) -> None:
    """Refuse arrays that are stored otherwise than this program stores them.

    Orbax reads other formats as well. In some, the name of an array is a path that leads anywhere.
    In OCDBT all names are keys of one database in the item's folder.

    Raises:
        CheckpointError: naming the item.
    """
    if not (step / item / TREE).is_file():
        raise CheckpointError(f"checkpoint {step} has no {item}; use one that this program saved")
    tree = regular_files.read_json(step / item / TREE)
    handlers = metadata.get("item_handlers")
    handler = handlers.get(item) if isinstance(handlers, dict) else None

    # All four must hold: the reader that Orbax will choose, a database, its formats, and a tree of
    # keys and types.
    is_ours = isinstance(handler, str) and HANDLER.fullmatch(handler)
    has_database = (step / item / "manifest.ocdbt").is_file()
    formats = [tree.get(key) is True for key in ("use_ocdbt", "use_zarr3")]
    if not is_ours or not has_database or not all(formats) or not _is_tree(tree):
        raise CheckpointError(
            f"checkpoint {step}: {item} is not in Orbax's format of OCDBT and zarr 3; use one that "
            "this program saved"
        )


def _is_tree(tree: dict[str, Any]) -> bool:
    """Return whether every array has the fields that Orbax needs: a path of keys, and a type."""
    # The fields may have any type, so whatever an access raises means that this is no tree.
    try:
        return all(
            all(
                # Orbax's numbers: 1 is an index of a list, 2 is a key of a dict.
                isinstance(key["key"], str) and key["key_type"] in (1, 2)
                for key in entry["key_metadata"]
            )
            and isinstance(entry["value_metadata"]["value_type"], str)
            for entry in tree["tree_metadata"].values()
        )
    except (LookupError, TypeError, AttributeError):
        return False
