"""Write tests/golden/t5_{1_0,1_1}.npz: random T5 models of Transformers, inputs and their logits.

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install transformers==5.23.0
    python tests/make_golden.py

Weights are rounded to float16 first, so that the files are small and yet exact. Inputs and targets
are longer than max_distance, so that every bucket of the position bias is used.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

FOLDER = Path(__file__).parent / "golden"
VERSIONS = {
    "t5_1_0": {"feed_forward_proj": "relu"},
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
VOCAB_SIZE, INPUT_LENGTHS, TARGET_LENGTH = 40, (150, 97), 140


def build_model(version: str, seed: int) -> T5ForConditionalGeneration:
    """A random T5 in eval mode whose heads, norms and position biases all matter."""
    torch.manual_seed(seed)
    # d_model is not num_heads * d_kv, and the stacks differ in depth: a mix-up changes a shape.
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=3,
        decoder_start_token_id=0,
        **VERSIONS[version],
    )
    model = T5ForConditionalGeneration(config)
    if not config.scale_decoder_outputs:
        # Transformers 5 ties the logits of every new T5; it keeps them apart where they differ.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_()
            elif "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
            weight.copy_(weight.half())
    return model.eval()


def random_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, S], padded with 0 to different lengths, and targets [B, T]."""
    rng = np.random.default_rng(seed)
    shape = len(INPUT_LENGTHS), max(INPUT_LENGTHS)
    inputs = rng.integers(1, VOCAB_SIZE, shape, dtype=np.int32)
    inputs[np.arange(shape[1]) >= np.array(INPUT_LENGTHS)[:, None]] = 0
    targets = rng.integers(1, VOCAB_SIZE, (shape[0], TARGET_LENGTH), dtype=np.int32)
    return inputs, targets


def compute_logits(
    model: T5ForConditionalGeneration, inputs: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Teacher-forced logits [B, T, V]; Transformers shifts the targets itself."""
    inputs, targets = torch.tensor(inputs).long(), torch.tensor(targets).long()
    with torch.no_grad():
        out = model(input_ids=inputs, attention_mask=(inputs > 0).long(), labels=targets)
    return out.logits.numpy()


def compute_buckets() -> dict[str, np.ndarray]:
    """Buckets of the distances -300 .. 300 (key - query), in both directions' rules."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    return {
        name: T5Attention._relative_position_bucket(distance, bidirectional=bidirectional)
        .numpy()
        .astype(np.uint8)
        for name, bidirectional in (("bidirectional", True), ("causal", False))
    }


def write(name: str, **arrays: np.ndarray) -> None:
    FOLDER.mkdir(exist_ok=True)
    temporary = FOLDER / f"{name}.tmp.npz"
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, FOLDER / f"{name}.npz")


def main() -> None:
    for seed, version in enumerate(VERSIONS):
        model = build_model(version, seed)
        inputs, targets = random_batch(seed)
        weights = {
            f"weight:{name}": weight.detach().half().numpy()
            for name, weight in model.named_parameters()
        }
        logits = compute_logits(model, inputs, targets)
        config = np.array(json.dumps(model.config.to_diff_dict()))
        write(version, inputs=inputs, targets=targets, logits=logits, config=config, **weights)
    write("buckets", **compute_buckets())


if __name__ == "__main__":
    main()
