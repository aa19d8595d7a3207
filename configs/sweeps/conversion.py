"""Ways of converting, compared on one parent: the paper's Figure 4, and what uptraining each saves.

The scored networks are also trained from scratch, with as many steps in all. This adds 6
pretrainings and 6 networks to score, about 40 minutes.

python launch.py --config=configs/sweeps/conversion.py --jobs=2   # nano, hours on two cores
python launch.py --config=configs/sweeps/conversion.py:large      # the size of the paper's Figure 4
"""

from configs.sweeps.grid import sweep

CLOSED = (
    "mean,mean-renorm,first,random,medoid,largest,prune,"
    "procrustes,procrustes-weight,svd-weight,svd-activation,svd-logit,svd-attention"
)
CURVES = "mean,first,random,procrustes,svd-weight,svd-activation,svd-logit,weighted,fuse"
NEAR_PARENT = "mean-kl1,svd-logit-kl1"
GROUPINGS = "mean-{0},svd-logit-{0}"
SEEDS = (0, 1, 2)


def get_config(arg: str = ""):
    losses = {"seeds": SEEDS, "tasks": "none"}
    at_once = losses | {"alphas": (0.0,)}
    alphas = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)
    groupings = ",".join(
        GROUPINGS.format(name)
        for name in ("strided", "random", "weight_cos", "act_cos", "act_aligned")
    )
    calibration = "svd-logit-1024,svd-logit-8192,svd-logit-524288"
    others = "svd-logit-sequential,svd-activation-sequential,svd-logit-shrink0,svd-logit-shrink0.1"
    budget = "mean-per_layer_budget,svd-logit-per_layer_budget"
    tuned = {"seeds": SEEDS}
    return sweep(
        "conversion",
        arg,
        damage=at_once | {"methods": CLOSED},
        where=at_once
        | {"methods": CLOSED, "kv_heads": (4,), "where": "self_attention,cross_attention"},
        groupings=at_once | {"methods": groupings, "kv_heads": (4,)},
        calibration=at_once | {"methods": f"{calibration},{others}", "kv_heads": (4, 1)},
        budget=at_once | {"methods": budget, "kv_heads": (8, 4, 2)},
        curves=losses
        | {"methods": f"{CURVES},{NEAR_PARENT}", "kv_heads": (0, 4, 1), "alphas": alphas},
        scores=tuned
        | {"methods": "mean,svd-logit", "kv_heads": (0, 4, 1), "alphas": (0.0, 0.005, 0.05)},
        scratch=tuned | {"methods": "none", "kv_heads": (4, 1)},
        figure4=tuned | {"methods": "mean,first,random", "kv_heads": (1,)},
    )
