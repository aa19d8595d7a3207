"""Other implementations of T5 on the same weights and inputs, to be timed beside ours.

Hugging Face Transformers (PyTorch) and CTranslate2, both in float32 on the CPU, from
`requirements-bench.txt`. Both are multi-head only. Nothing else of the project imports them.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gqa.interop import huggingface
from gqa.model.config import Config
from gqa.runtime import hardware

HUGGING_FACE, CTRANSLATE2 = "hugging_face", "ctranslate2"
TITLES = {HUGGING_FACE: "Hugging Face", CTRANSLATE2: "CTranslate2"}
PACKAGES = {
    HUGGING_FACE: ("torch", "transformers"),
    CTRANSLATE2: ("torch", "transformers", "ctranslate2"),  # it reads a Transformers model
}


class Peer(NamedTuple):
    """`generate(length)` gives tokens [B, length], greedily and without an end."""

    generate: Callable[[int], np.ndarray]
    encode: Callable[[], object] | None


def installed() -> list[str]:
    """The names of the peers whose packages are here."""
    return [name for name in PACKAGES if not _missing(name)]


def missing() -> list[str]:
    """A line for each of the others, which says how to install it."""
    return [
        f"{TITLES[name]} is not timed: no {', '.join(packages)}; install requirements-bench.txt"
        for name in PACKAGES
        if (packages := _missing(name))
    ]


def _missing(name: str) -> list[str]:
    return [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]


def build(name: str, params: dict, config: Config, inputs: np.ndarray) -> Peer:
    """The peer `name` with our multi-head parameters, on inputs [B, S] without padding."""
    return {HUGGING_FACE: hugging_face, CTRANSLATE2: ctranslate2}[name](params, config, inputs)


def hugging_face(params: dict, config: Config, inputs: np.ndarray) -> Peer:
    """Transformers' own `generate`, with its cache."""
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
            # The cache it makes itself is too short for a decoder deeper than the encoder.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            use_cache=True,
        )
        return out[:, 1:].numpy()

    @torch.inference_mode()
    def encode():
        return network.encoder(input_ids=tokens, attention_mask=mask)

    return Peer(generate, encode)


def _transformers(params: dict, config: Config):
    """Transformers' T5 with our parameters; attention is SDPA if this version of T5 has it."""
    import torch
    import transformers

    torch.set_num_threads(len(hardware.cores()))
    hf_config = transformers.T5Config(**huggingface.from_config(config))
    network = transformers.T5ForConditionalGeneration(hf_config)
    network.set_attn_implementation("sdpa" if network._supports_sdpa else "eager")
    if not config.tied_logits:
        # Transformers 5 ties the logits of every new T5; it keeps them apart where they differ.
        network.lm_head.weight = torch.nn.Parameter(torch.empty_like(network.lm_head.weight))
    state = huggingface.state_dict(params, config)
    state |= {copy: state["shared.weight"] for copy in huggingface.COPIES if copy not in state}
    network.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    network.generation_config.eos_token_id = None
    return network


def ctranslate2(params: dict, config: Config, inputs: np.ndarray) -> Peer:
    """A CTranslate2 model in float32, whose tokens are the words "0", "1" and so on.

    It cannot do without an end, only put it off: a token 1 it would choose becomes another.
    """
    import ctranslate2
    from ctranslate2.converters.transformers import T5Loader

    network = _transformers(params, config)
    # Transformers 5 says "tied" of every T5, which CTranslate2 takes for "scaled".
    network.config.tie_word_embeddings = config.tied_logits
    spec = T5Loader().get_model_spec(network)
    words = [str(i) for i in range(config.vocab_size)]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.decoder_start_token = spec.config.bos_token = words[0]
    spec.config.eos_token, spec.config.unk_token = words[1], words[2]
    spec.validate()
    spec.optimize(quantization="float32")
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
            max_input_length=0,
            min_decoding_length=length,
            max_decoding_length=length,
        )
        return np.array([[int(word) for word in result.hypotheses[0]] for result in results])

    return Peer(generate, None)


def hugging_face_training(
    params: dict, config: Config, learning_rate: float
) -> Callable[[np.ndarray, np.ndarray], float]:
    """A training step (inputs [B, S], targets [B, T]) -> loss, with Transformers' Adafactor.

    Its settings are ours: updates scaled by the size of a parameter, a rate from outside.
    """
    import torch
    from transformers.optimization import Adafactor

    network = _transformers(params, config).train()
    optimizer = Adafactor(
        network.parameters(), lr=learning_rate, scale_parameter=True, relative_step=False
    )

    def step(inputs: np.ndarray, targets: np.ndarray) -> float:
        inputs, targets = torch.tensor(inputs).long(), torch.tensor(targets).long()
        optimizer.zero_grad()
        loss = network(input_ids=inputs, labels=targets).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
