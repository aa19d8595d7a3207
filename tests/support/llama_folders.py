"""Small Llama folders of Hugging Face, written without Transformers."""

import json

import numpy as np
from safetensors.numpy import save_file

D, N, H, L = 32, 8, 8, 2
SIZES = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_attention_heads": N,
    "num_hidden_layers": L,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def write_llama(folder, kv_heads=N, dtype=np.float32, change=None, **more):
    """Llama's tensors without Transformers, in two files; returns them."""
    rng = np.random.default_rng(0)
    state = {"model.embed_tokens.weight": rng.normal(size=(64, D)).astype(dtype)}
    for i in range(L):
        name = f"model.layers.{i}."
        for role, heads in (("q", N), ("k", kv_heads), ("v", kv_heads)):
            state[f"{name}self_attn.{role}_proj.weight"] = rng.normal(size=(heads * H, D))
        state[f"{name}self_attn.o_proj.weight"] = rng.normal(size=(D, N * H))
        state[f"{name}post_attention_layernorm.weight"] = np.ones(D)
    state = {key: x.astype(dtype) for key, x in state.items()} | (change or {})
    state = {key: x for key, x in state.items() if x is not None}
    folder.mkdir()
    names, places = list(state), {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    settings = SIZES | {"model_type": "llama", "head_dim": H, "num_key_value_heads": kv_heads}
    (folder / "config.json").write_text(json.dumps(settings | more))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return state
