"""Time and quality for every number of KV heads (the paper's Figure 6), and how many one needs.

python launch.py --config=configs/sweeps/groups.py           # nano, half an hour on two cores
python launch.py --config=configs/sweeps/groups.py:xxl       # the paper's
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.seeds=0,1,2
python launch.py --config=configs/sweeps/groups.py --config.sweep.groups.kv_heads=0,8,1
"""

from configs.sweeps.grid import sweep


def get_config(arg: str = ""):
    return sweep("groups", arg, groups={})
