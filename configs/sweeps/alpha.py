"""Quality against the share of uptraining, for MHA, GQA and MQA (the paper's Figure 5).

python launch.py --config=configs/sweeps/alpha.py --jobs=2   # nano, 3 seeds, two cores
python launch.py --config=configs/sweeps/alpha.py:xxl        # the paper's
"""

from configs.sweeps.grid import sweep


def get_config(arg: str = ""):
    lists = {"kv_heads": (0, 8, 1), "alphas": (0.0, 0.01, 0.02, 0.05, 0.1)}
    return sweep("alpha", arg, alpha=lists)
