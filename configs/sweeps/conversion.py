"""Ways of converting to one KV head, at the paper's alpha (its Figure 4).

python launch.py --config=configs/sweeps/conversion.py         # nano, a quarter of an hour
python launch.py --config=configs/sweeps/conversion.py:large   # the paper's
"""

from configs.sweeps.grid import sweep


def get_config(arg: str = ""):
    methods = {"kv_heads": (1,), "methods": "mean,first,random"}
    return sweep("conversion", arg, conversion=methods)
