"""Multi-head attention: the parent of every other variant, pretrained, fine-tuned and scored.

python launch.py --config=configs/mha.py          # nano, minutes on two cores
python launch.py --config=configs/mha.py:large    # the paper's MHA-Large
"""

from configs import base


def get_config(arg: str = ""):
    config = base.get_config(arg)
    config.uptrain.alpha = 0.0  # the parent as it is
    return config
