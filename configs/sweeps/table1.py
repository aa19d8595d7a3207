"""The paper's Table 1 and Figure 3: MHA at two sizes, MQA and GQA-8 at the larger one.

The paper's limitations name a row that it lacks: MQA and GQA-8 trained from scratch. They are here,
with as many steps in all as the converted ones, and add 15 minutes.

python launch.py --config=configs/sweeps/table1.py             # nano and pico, 35 min on two cores
python launch.py --config=configs/sweeps/table1.py:xxl         # the paper's XXL and Large
"""

from configs.sizes import SMALLER
from configs.sweeps.grid import sweep
from gqa.runtime.errors import UserError


def get_config(arg: str = ""):
    size = arg or "nano"
    if size not in SMALLER:
        raise UserError(f"size={size!r} has no smaller one; use one of {', '.join(SMALLER)}")
    larger = {"kv_heads": (8, 1), "methods": "mean,none"}
    smaller = {"kv_heads": (0,), "alphas": (0.0,), "sizes": SMALLER[size]}
    return sweep("table1", arg, larger=larger, smaller=smaller)
