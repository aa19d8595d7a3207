"""Write tests/golden/: T5 models of Transformers, inputs, and what Transformers makes of them.

t5_1_0 and t5_1_1 are random and come with their logits, t5_search is trained and comes with the
texts it generates. Training takes a minute.

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install transformers==5.23.0
    python tests/make_golden.py

Weights are rounded to float16 first, so that the files are small and yet exact. Inputs and targets
of the random models are longer than max_distance, so that every bucket of position bias is used.
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
# Of the trained model: what it is asked to do, symbols of its texts, and room for the longest.
COPY, REVERSE, CHOOSE = 3, 4, 5
SYMBOLS, LONGEST, GENERATED_LENGTH = range(8, 20), 8, 14


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


def search_example(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A text with its task in front, and an answer to it.

    To CHOOSE is to answer with 6 and one of three tokens before the text, or with 7 before it. The
    first token is more often 6, but no single answer with 6 is as likely as the one with 7: greedy
    search and beam search must differ.
    """
    task = rng.choice([COPY, REVERSE, CHOOSE])
    text = list(rng.choice(SYMBOLS, rng.integers(1, LONGEST + 1)))
    answer = text[::-1] if task == REVERSE else text
    if task == CHOOSE:
        six = [6, rng.choice([20, 21, 22], p=[0.5, 0.3, 0.2])]
        answer = (six if rng.random() < 0.6 else [7]) + text
    return [task, *text, 1], [*answer, 1]


def search_batch(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, S] and targets [B, T], padded with 0."""
    batch = np.zeros((2, size, GENERATED_LENGTH), np.int32)
    for row in range(size):
        for side, text in enumerate(search_example(rng)):
            batch[side, row, : len(text)] = text
    return tuple(batch)


def search_model(config: dict) -> T5ForConditionalGeneration:
    """A new T5 1.1 of a config, with logits of its own (see `build_model`)."""
    model = T5ForConditionalGeneration(T5Config(**config))
    logits = torch.randn_like(model.shared.weight) * model.config.d_model**-0.5
    model.lm_head.weight = torch.nn.Parameter(logits)
    return model


def train_search_model(steps: int = 1000, batch_size: int = 64) -> T5ForConditionalGeneration:
    """A small T5 that has learned the tasks of `search_example`, its weights rounded to float16."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 24, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    start = {"num_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    model = search_model(sizes | start | VERSIONS["t5_1_1"])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 100, 1.02 - step / steps)
        inputs, targets = (torch.tensor(side).long() for side in search_batch(rng, batch_size))
        labels = targets.masked_fill(targets == 0, -100)
        loss = model(input_ids=inputs, attention_mask=(inputs > 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"search model: loss {loss.item():.3f}")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    return model.eval()


def generate(model: T5ForConditionalGeneration, inputs: np.ndarray, num_beams: int) -> np.ndarray:
    """Tokens [B, GENERATED_LENGTH] of greedy or beam search, 0 behind their end.

    Length penalty 0 is where Transformers' and T5's formulas agree.
    """
    tokens = torch.tensor(inputs).long()
    penalty = {"length_penalty": 0.0} if num_beams > 1 else {}
    out = model.generate(
        tokens,
        attention_mask=(tokens > 0).long(),
        max_new_tokens=GENERATED_LENGTH,
        do_sample=False,
        num_beams=num_beams,
        **penalty,
    )
    out = out[:, 1:].numpy()  # without the start token
    texts = np.zeros((len(out), GENERATED_LENGTH), np.int32)
    texts[:, : out.shape[1]] = out
    behind = np.cumsum(texts == 1, axis=1) - (texts == 1) > 0
    return np.where(behind, 0, texts)  # Transformers fills some of them with the end token


def weights_of(model: T5ForConditionalGeneration) -> dict[str, np.ndarray]:
    """Weights in float16 and the config, by their names in the files."""
    weights = {f"weight:{n}": w.detach().half().numpy() for n, w in model.named_parameters()}
    return weights | {"config": np.array(json.dumps(model.config.to_diff_dict()))}


def write(name: str, **arrays: np.ndarray) -> None:
    FOLDER.mkdir(exist_ok=True)
    temporary = FOLDER / f"{name}.tmp.npz"
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, FOLDER / f"{name}.npz")


def main() -> None:
    for seed, version in enumerate(VERSIONS):
        model = build_model(version, seed)
        inputs, targets = random_batch(seed)
        logits = compute_logits(model, inputs, targets)
        write(version, inputs=inputs, targets=targets, logits=logits, **weights_of(model))
    model = train_search_model()
    inputs, _ = search_batch(np.random.default_rng(1), 32)
    texts = {name: generate(model, inputs, beams) for name, beams in (("greedy", 1), ("beam", 4))}
    write("t5_search", inputs=inputs, **texts, **weights_of(model))
    write("buckets", **compute_buckets())


if __name__ == "__main__":
    main()
