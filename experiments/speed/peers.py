"""Build other libraries' T5 with our weights and inputs, to be timed beside ours.

The peers are Hugging Face Transformers (PyTorch) and CTranslate2, both in float32 on the CPU.
`requirements-bench.txt` installs them. `benchmark.py` times the networks that this file builds.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gqa.interop import ctranslate2_folders, huggingface
from gqa.model.config import Config
from gqa.runtime import hardware

HUGGING_FACE, CTRANSLATE2 = "hugging_face", "ctranslate2"
TITLES = {HUGGING_FACE: "Hugging Face", CTRANSLATE2: "CTranslate2"}
PACKAGES = {
    HUGGING_FACE: ("torch", "transformers"),
    CTRANSLATE2: ("ctranslate2",),
}


class Peer(NamedTuple):
    """A network of another library with its inputs.

    Args:
        generate: returns tokens [B, length], decoded greedily without stopping at EOS.
        encode: runs the encoder alone; None where the library cannot.
    """

    generate: Callable[[int], np.ndarray]
    encode: Callable[[], object] | None


# (inputs [B, S], targets [B, T]) -> loss of one training step.
TrainStep = Callable[[np.ndarray, np.ndarray], float]


def installed() -> list[str]:
    """Return the names of the peers whose packages are installed."""
    return [name for name in PACKAGES if not _missing(name)]


def missing() -> list[str]:
    """Return a line for each peer that is not installed, which says how to install it."""
    return [
        f"{TITLES[name]} is not timed because packages are missing ({', '.join(packages)}); "
        "pip install -r requirements-bench.txt"
        for name in PACKAGES
        if (packages := _missing(name))
    ]


def _missing(name: str) -> list[str]:
    # Find the packages without importing them, because the import of torch takes seconds.
    return [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]


def build(name: str, params: dict, config: Config, inputs: np.ndarray) -> Peer:
    """Return the peer `name` with our parameters, on inputs [B, S] without padding."""
    return {HUGGING_FACE: hugging_face, CTRANSLATE2: ctranslate2}[name](params, config, inputs)


def hugging_face(params: dict, config: Config, inputs: np.ndarray) -> Peer:
    """Return Transformers' T5, which generates with its own `generate` and its KV cache."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    network = _transformers(params, config).eval()
    tokens = torch.tensor(inputs).long()
    mask = torch.ones_like(tokens)

    def generate(length: int) -> np.ndarray:
        out = network.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=length,
            eos_token_id=None,
            do_sample=False,
            num_beams=1,
            # The cache that `generate` would create has as many layers as the encoder, too few for
            # a deeper decoder.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            use_cache=True,
        )
        return out[:, 1:].numpy()  # without the start token

    @torch.inference_mode()
    def encode() -> object:
        return network.encoder(input_ids=tokens, attention_mask=mask)

    return Peer(generate, encode)


def _transformers(params: dict, config: Config) -> Any:
    """Return Transformers' T5, or ours for it if grouped; SDPA if this version has it."""
    import torch
    import transformers

    # As many threads as cores that this process may use, like our own programs.
    torch.set_num_threads(len(hardware.cores()))
    values = huggingface.from_config(config)
    kind: Any
    if values["model_type"] == "t5":
        kind = transformers.T5ForConditionalGeneration
    else:
        from gqa.interop.huggingface import modeling_t5_gqa

        kind = modeling_t5_gqa.T5GQAForConditionalGeneration
        del values["auto_map"]
    network = kind(kind.config_class(**values))
    network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")

    if not config.tied_logits:
        # Transformers 5 ties the logits of every new T5 to the embedding, so untie them.
        network.lm_head.weight = torch.nn.Parameter(torch.empty_like(network.lm_head.weight))

    # Transformers expects the copies of the embedding under their own names, too.
    state = huggingface.state_dict(params, config)
    state |= {copy: state["shared.weight"] for copy in huggingface.COPIES if copy not in state}
    network.load_state_dict({key: torch.tensor(value) for key, value in state.items()})

    # A text that ends early would take less time than the others.
    network.generation_config.eos_token_id = None
    return network


def ctranslate2(params: dict, config: Config, inputs: np.ndarray) -> Peer:
    """Return a CTranslate2 model in float32, whose tokens are the words "0", "1" and so on.

    CTranslate2 always stops at EOS (token 1). A minimum length keeps it from choosing EOS, so where
    the other systems choose token 1 it chooses the next likely token.
    """
    import ctranslate2

    # CTranslate2 takes words instead of ids, so every id is a word.
    words = [str(i) for i in range(config.vocab_size)]
    spec = ctranslate2_folders.specification(params, config)
    ctranslate2_folders.register(spec, words)

    # A model is loaded from a folder; after that the folder is not needed.
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        translator = ctranslate2.Translator(
            folder, device="cpu", compute_type="float32", intra_threads=len(hardware.cores())
        )

    source = [[words[i] for i in row] for row in inputs]

    def generate(length: int) -> np.ndarray:
        results = translator.translate_batch(
            source,
            beam_size=1,
            max_input_length=0,  # inputs are never cut
            min_decoding_length=length,
            max_decoding_length=length,
        )
        return np.array([[int(word) for word in result.hypotheses[0]] for result in results])

    return Peer(generate, None)


def hugging_face_training(params: dict, config: Config, learning_rate: float) -> TrainStep:
    """Return a training step of Transformers' T5 with Transformers' Adafactor.

    Adafactor has the settings of ours: updates are scaled by the size of a parameter, and the
    learning rate is constant.
    """
    import torch
    from transformers.optimization import Adafactor

    network = _transformers(params, config).train()
    optimizer = Adafactor(
        network.parameters(), lr=learning_rate, scale_parameter=True, relative_step=False
    )

    def step(inputs: np.ndarray, targets: np.ndarray) -> float:
        input_ids, labels = torch.tensor(inputs).long(), torch.tensor(targets).long()
        optimizer.zero_grad()
        loss = network(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
