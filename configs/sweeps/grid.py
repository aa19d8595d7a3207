"""What a sweep varies: grids over a base config, each every combination of its lists."""

from ml_collections import ConfigDict

from configs import base


def sweep(name: str, arg: str, **grids: dict) -> ConfigDict:
    """The base config of `arg` with the section `sweep`; every key of either can be set.

    Each grid gives some of these lists; of the others it has the one value of the base config.
    """
    config = base.get_config(arg)
    config.unlock()
    config.name = f"{name}-{config.size}"
    config.sweep = ConfigDict()
    for grid, lists in grids.items():
        axes = config.sweep[grid] = ConfigDict()
        axes.kv_heads = ()  # decoder self- and cross-attention; 0: multi-head; (): all that divide
        axes.alphas = (config.uptrain.alpha,)
        axes.methods = config.convert.method  # comma-separated, as are tasks and sizes
        axes.seeds = (config.seed,)
        axes.tasks = ""  # empty: those of finetune.tasks
        axes.sizes = config.size
        axes.update(lists)
    return config.lock()
