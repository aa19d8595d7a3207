"""Quality against the share of uptraining, for MHA, GQA and MQA (the paper's Figure 5).

GQA and MQA are also trained from scratch, with the steps of alpha 0 and .05 in all. This adds
two pretrainings and four networks to score, 20 of the 70 minutes.

python launch.py --config=configs/sweeps/alpha.py            # nano, 70 minutes on two cores
python launch.py --config=configs/sweeps/alpha.py:xxl        # the paper's
"""

from configs.sweeps.grid import sweep


def get_config(arg: str = ""):
    lists = {"kv_heads": (0, 8, 1), "alphas": (0.0, 0.01, 0.02, 0.05, 0.1)}
    scratch = {"kv_heads": (8, 1), "alphas": (0.0, 0.05), "methods": "none"}
    return sweep("alpha", arg, alpha=lists, scratch=scratch)
