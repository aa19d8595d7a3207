"""Llama-style checkpoints of Hugging Face, rewritten with fewer KV heads."""
