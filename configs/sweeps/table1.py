"""The paper's Table 1 and Figure 3: MHA at two sizes, MQA and GQA-8 at the larger one.

python launch.py --config=configs/sweeps/table1.py             # nano and pico, 20 min on two cores
python launch.py --config=configs/sweeps/table1.py:xxl         # the paper's XXL and Large
"""

from configs.sizes import SMALLER
from configs.sweeps.grid import sweep
from gqa.runtime.errors import UserError


def get_config(arg: str = ""):
    size = arg or "nano"
    if size not in SMALLER:
        raise UserError(f"size={size!r} has no smaller one; use one of {', '.join(SMALLER)}")
    smaller = {"kv_heads": (0,), "alphas": (0.0,), "sizes": SMALLER[size]}
    return sweep("table1", arg, larger={"kv_heads": (8, 1)}, smaller=smaller)
