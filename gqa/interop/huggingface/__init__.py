"""T5 checkpoints of Hugging Face Transformers: T5 1.0 and 1.1, mT5, umT5 and their relatives.

This file only exports names. reading.py and writing.py read and write folders, config.py translates
config.json, activations.py the activations in it, names.py the names and shapes of tensors, and
command.py is `python -m gqa export`. modeling_t5_gqa.py is a grouped T5 for Transformers, which
goes into the folders. tokenizer_files.py writes the vocabulary for Transformers, with the rules of
normalization.py.
The safetensors format itself is in gqa/interop/safetensors_files.py.
"""

from gqa.interop.huggingface.config import from_config, to_config
from gqa.interop.huggingface.names import COPIES, UNUSED
from gqa.interop.huggingface.reading import from_state_dict, load, open_folder
from gqa.interop.huggingface.writing import VOCABULARY, save, state_dict

__all__ = [
    "COPIES",
    "UNUSED",
    "VOCABULARY",
    "from_config",
    "from_state_dict",
    "load",
    "open_folder",
    "save",
    "state_dict",
    "to_config",
]
