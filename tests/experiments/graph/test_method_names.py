"""What a way of converting is called, and that its name says which config it was."""

import pytest

from configs import base
from experiments.graph import method_names
from experiments.graph.plan import plan
from gqa.runtime.errors import UserError


@pytest.mark.parametrize(
    "name",
    [
        "mean",
        "random-random",
        "mean-strided-renorm",
        "svd-weight",
        "svd-logit-sequential-8192-shrink0.1",
        "procrustes-activation-act_cos",
        "svd-activation-shrink0",
        "svd-attention-shrink0.1",
        "prune",
        "prune-sequential-8192",
        "first-kl0.5",
        "fuse",
    ],
)
def test_a_name_leads_to_the_config_that_is_called_so(name):
    config = base.get_config("nano", kv_heads=4)
    config.update_from_flattened_dict(method_names.keys(name))
    uptrained = next(stage for stage in plan(config, None) if stage.kind == "uptrain")
    assert uptrained.variant.method_label == name
    converted = next(stage for stage in plan(config, None) if stage.kind == "convert")
    assert converted.variant.method_label == name.partition("-kl")[0]


def test_words_left_out_leave_the_config_alone():
    assert method_names.keys("svd") == {"convert.method": "svd"}


@pytest.mark.parametrize("name", ["mean-what", "svd-logit-klx", "svd-shrink", "mean-kl-1", "svd-"])
def test_a_word_that_says_nothing_is_named(name):
    with pytest.raises(UserError, match=rf"^method '{name}': '[a-z]*' says nothing; after the"):
        method_names.keys(name)
