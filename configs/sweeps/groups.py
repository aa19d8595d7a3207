"""Time and quality for every number of KV heads (the paper's Figure 6), and how many one needs.

Each number is reached by both ways of converting, and by training from scratch with as many steps
in all. The last needs a pretraining for each number, half of the time.

python launch.py --config=configs/sweeps/groups.py --jobs=2   # nano, 3 seeds, two cores
python launch.py --config=configs/sweeps/groups.py:xxl        # the paper's
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.seeds=0,
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.kv_heads=0,8,1
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.methods=mean
"""

from configs.sweeps.grid import sweep


def get_config(arg: str = ""):
    return sweep("groups", arg, groups={"methods": "mean,svd,none"})
