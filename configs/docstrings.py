"""GQA-8 on the documentation of the installed packages: span corruption, then two tasks in English.

python launch.py --config=configs/docstrings.py         # nano, ten minutes on two cores
python launch.py --config=configs/docstrings.py:mini    # hours

Pretraining is T5's, on prose that every installation has. The default job says words instead,
because minutes are too few to learn to write English: a nano network's answers here are no better
than a constant one.
"""

from configs import base, cpu


def get_config(arg: str = "", kv_heads: int | None = 8):
    """Return the config of a size; pico and nano train in minutes, mini in hours.

    The arguments are those of `configs.base.get_config`.
    """
    config = base.get_config(arg, kv_heads)
    if config.size not in cpu.SIZES:
        return config

    tiny = config.size != "mini"
    config.model.vocab_size = 4096 if tiny else 8192
    config.compare = ""

    pretrain, finetune = config.pretrain, config.finetune
    pretrain.task = "docstrings"
    pretrain.steps = 1600 if tiny else 20_000
    pretrain.inputs_length, pretrain.targets_length = 128, 29
    pretrain.batch_size = 8
    pretrain.every = pretrain.steps // 5

    finetune.tasks = "parameter_qa,docstring_summary"
    finetune.steps = 500 if tiny else 2000
    finetune.inputs_length, finetune.targets_length = 128, 48
    finetune.batch_size = 8
    finetune.learning_rate = 1e-2 if tiny else 3e-3
    finetune.every = finetune.steps // 5

    config.evaluate.examples = 256 if tiny else 1024
    config.benchmark.inputs_length, config.benchmark.targets_length = 512, 64
    return config
