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
        axes.where = "both"  # or self_attention, cross_attention: what is converted
        # Comma-separated, as are where, tasks and sizes. A method may be followed by what departs
        # from the base config: svd-activation, mean-strided-renorm, svd-8192 (calibration tokens),
        # svd-sequential, svd-shrink0.1, mean-kl1 (uptrain.beta).
        axes.methods = config.convert.method
        axes.seeds = (config.seed,)
        axes.tasks = ""  # empty: those of finetune.tasks; none: no fine-tuning and no timing
        axes.sizes = config.size
        axes.update(lists)
    return config.lock()
