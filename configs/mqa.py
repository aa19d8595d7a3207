"""Multi-query attention: one KV head in decoder self- and cross-attention (Shazeer, 2019).

python launch.py --config=configs/mqa.py
"""

from configs import base


def get_config(arg: str = ""):
    return base.get_config(arg, kv_heads=1)
