"""Model sizes, one row each. small .. xxl are T5 1.1; pico, nano and mini are for a CPU.

The sizes for a CPU have 16 query heads although they are narrow, so that 8 KV heads are fewer.
Their vocabulary (0) is as large as suits the text.
"""

COLUMNS = ("d_model", "d_ff", "num_heads", "head_dim", "layers", "vocab_size")

SIZES = {
    "pico": (64, 192, 16, 8, 2, 0),
    "nano": (128, 384, 16, 16, 2, 0),
    "mini": (256, 768, 16, 32, 4, 0),
    "small": (512, 1024, 6, 64, 8, 32128),
    "base": (768, 2048, 12, 64, 12, 32128),
    "large": (1024, 2816, 16, 64, 24, 32128),
    "xl": (2048, 5120, 32, 64, 24, 32128),
    "xxl": (4096, 10240, 64, 64, 24, 32128),
}

# The next smaller size worth comparing with, as the paper does Large with XXL.
SMALLER = {"nano": "pico", "mini": "nano", "base": "small", "large": "base"} | dict.fromkeys(
    ("xl", "xxl"), "large"
)
