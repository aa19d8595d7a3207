"""Any number of KV heads in decoder self- and cross-attention.

python launch.py --config=configs/gqa.py:kv_heads=4
python launch.py --config=configs/gqa.py:kv_heads=4,size=base
"""

from configs import base


def get_config(arg: str = "kv_heads=4"):
    return base.get_config(arg)
