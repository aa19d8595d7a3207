"""Describe a sweep over a base config: grids, each of which runs every combination of its lists.

`experiments/graph/sweep.py` turns a sweep into one config per combination.
"""

from ml_collections import ConfigDict

from configs import base, cpu


def sweep(name: str, arg: str, **grids: dict) -> ConfigDict:
    """Return the base config of `arg` with a section `sweep`, whose keys can be set like any other.

    Args:
        name: of the sweep, in the results.
        arg: a size, as for `configs.base.get_config`.
        grids: the lists of each grid, by the grid's name. A list that a grid leaves out has the one
            value of the base config.
    """
    config = base.get_config(arg)
    config.unlock()
    config.name = f"{name}-{config.size}"
    config.sweep = ConfigDict()
    for grid, lists in grids.items():
        axes = config.sweep[grid] = ConfigDict()
        # KV heads of decoder self- and cross-attention. 0 stands for multi-head; (): every number
        # that divides the query heads.
        axes.kv_heads = ()
        axes.alphas = (config.uptrain.alpha,)  # values of uptrain.alpha
        axes.where = "both"  # values of convert.where, separated by commas
        # Methods, separated by commas. A method's name may go on with settings that differ from the
        # base config: svd-activation (space), mean-strided-renorm (grouping, renorm), svd-8192
        # (calibration tokens), svd-sequential, svd-shrink0.1 (shrinkage),
        # svd-logit-per_layer_budget, mean-kl1 (uptrain.beta). none: trained from scratch.
        axes.methods = config.convert.method
        # Three seeds show the chance in training, where a training takes minutes.
        axes.seeds = (0, 1, 2) if config.size in cpu.MINUTES else (config.seed,)
        # Tasks, separated by commas. Empty: those of finetune.tasks; none: networks are neither
        # fine-tuned nor timed.
        axes.tasks = ""
        axes.sizes = config.size  # sizes, separated by commas
        axes.update(lists)
    return config.lock()
