"""Time and quality for every number of KV heads (the paper's Figure 6), and how many one needs.

Each number is reached by conversion, and by training from scratch with as many steps in all. The
second costs a pretraining for each number, 25 of the 45 minutes.

python launch.py --config=configs/sweeps/groups.py           # nano, 45 minutes on two cores
python launch.py --config=configs/sweeps/groups.py:xxl       # the paper's
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.seeds=0,1,2
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.kv_heads=0,8,1
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.methods=mean
"""

from configs.sweeps.grid import sweep


def get_config(arg: str = ""):
    return sweep("groups", arg, groups={"methods": "mean,none"})
