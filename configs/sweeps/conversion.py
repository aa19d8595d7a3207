"""Ways of converting, compared on one parent: the paper's Figure 4, and what uptraining each saves.

python launch.py --config=configs/sweeps/conversion.py --jobs=2   # nano, 3 seeds, two cores
python launch.py --config=configs/sweeps/conversion.py:large      # the size of the paper's Figure 4
"""

from configs.sweeps.grid import sweep

CLOSED = (
    "mean,mean-renorm,first,random,medoid,largest,prune,"
    "procrustes,procrustes-weight,svd-weight,svd-activation,svd-logit,svd-attention"
)
CURVES = "mean,first,random,procrustes,svd-weight,svd-activation,svd-logit,svd-attention"
NEAR_PARENT = "mean-kl1,svd-logit-kl1"
GROUPINGS = ("strided", "random", "weight_cos", "act_cos", "act_aligned")


def get_config(arg: str = ""):
    losses = {"tasks": "none"}
    at_once = losses | {"alphas": (0.0,)}
    alphas = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)
    groupings = ",".join(f"mean-{name},svd-logit-{name}" for name in GROUPINGS)
    calibration = "svd-logit-1024,svd-logit-8192,svd-logit-524288"
    others = "svd-logit-sequential,svd-activation-sequential,svd-logit-shrink0,svd-logit-shrink0.1"
    budget = "mean-per_layer_budget,svd-logit-per_layer_budget"
    one_attention = {"kv_heads": (4,), "where": "self_attention,cross_attention"}
    return sweep(
        "conversion",
        arg,
        damage=at_once | {"methods": CLOSED},
        where=at_once | one_attention | {"methods": "mean,procrustes,svd-logit,svd-attention"},
        groupings=at_once | {"methods": groupings, "kv_heads": (4,)},
        calibration=at_once | {"methods": f"{calibration},{others}", "kv_heads": (4, 1)},
        budget=at_once | {"methods": budget, "kv_heads": (8, 4, 2)},
        curves=losses
        | {"methods": f"{CURVES},{NEAR_PARENT}", "kv_heads": (0, 4, 1), "alphas": alphas},
        learned=losses | {"methods": "weighted,fuse", "kv_heads": (4, 1), "alphas": (0.01, 0.05)},
        scores={"methods": "mean,svd-logit", "kv_heads": (4, 1), "alphas": (0.0, 0.05)},
        figure4={"methods": "mean,first,random", "kv_heads": (1,)},
    )
