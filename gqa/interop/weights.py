"""The formats in which folders of Hugging Face keep weights, in the order of preference.

The order is that of Transformers: safetensors before PyTorch's files; Flax's files, which
Transformers no longer reads, are the last. Each format has a module that finds the places of the
tensors; `Tensors` reads them.
"""

import os

from gqa.interop import flax_files, torch_files
from gqa.interop.safetensors_files import SAFETENSORS, Format, Tensors

TORCH = Format(torch_files.SINGLE, torch_files.INDEX, torch_files.header)
FLAX = Format(flax_files.SINGLE, flax_files.INDEX, flax_files.header, flax_files.torch_name)
FORMATS = (SAFETENSORS, TORCH, FLAX)


def open_folder(folder: str | os.PathLike) -> Tensors:
    """Return the tensors of a folder, from the first of the formats that it has.

    Raises:
        CheckpointError: naming a file that is missing or that cannot be used.
    """
    return Tensors(folder, FORMATS)
