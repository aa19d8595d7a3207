"""Checkpoints of other programs: Hugging Face Transformers and T5X; CTranslate2."""
