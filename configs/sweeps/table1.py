"""The paper's Table 1 and Figure 3: MHA at two sizes, MQA and GQA-8 at the larger one.

Two comparisons are added: conversion by `svd`, with and without uptraining, and a row whose lack
the paper names among its limitations, MQA and GQA-8 trained from scratch with as many steps in all.

python launch.py --config=configs/sweeps/table1.py --jobs=2   # nano and pico, 3 seeds, two cores
python launch.py --config=configs/sweeps/table1.py:xxl        # the paper's XXL and Large
"""

from configs.sizes import SMALLER
from configs.sweeps.grid import sweep
from gqa.runtime.errors import UserError


def get_config(arg: str = ""):
    size = arg or "nano"
    if size not in SMALLER:
        raise UserError(f"size={size!r} has no smaller one; use one of {', '.join(SMALLER)}")
    larger = {"kv_heads": (8, 1), "methods": "mean,svd,none"}
    at_once = {"kv_heads": (8, 1), "methods": "svd", "alphas": (0.0,)}
    smaller = {"kv_heads": (0,), "alphas": (0.0,), "sizes": SMALLER[size]}
    return sweep("table1", arg, larger=larger, at_once=at_once, smaller=smaller)
