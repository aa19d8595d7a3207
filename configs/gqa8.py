"""Grouped-query attention with 8 KV heads in decoder self- and cross-attention, the paper's choice.

python launch.py --config=configs/gqa8.py         # nano, minutes on two cores
python launch.py --config=configs/gqa8.py:xxl     # the paper's GQA-8-XXL
"""

from configs import base


def get_config(arg: str = ""):
    return base.get_config(arg, kv_heads=8)
