"""Conversions of one parent have what was measured of it in common."""

import dataclasses

import numpy as np
import pytest

from experiments.stages import convert
from experiments.stages.inputs import CheckpointInfo, Parent
from experiments.stages.settings import ConvertSettings
from gqa.conversion import calibration
from tests.support import variants

VARIANT = variants.grouped(
    num_heads=4, num_kv_heads=2, method="svd", space="logit", grouping="contiguous"
)
BOTH = ("self_attention", "cross_attention")


@pytest.fixture
def measured(monkeypatch):
    """How often measure were measured, one entry a time; nothing is kept before or after."""
    times = []
    measure = calibration.input_covariances

    def counted(*args):
        times.append(args)
        return measure(*args)

    monkeypatch.setattr(calibration, "input_covariances", counted)
    monkeypatch.setattr(convert, "_last_measured", None)
    return times


@pytest.fixture
def calibrated(tiny, random_params, batch, tmp_path):
    """`convert._measured` of a parent; `path` says of which."""

    def of(path="1", attentions=BOTH, batches=1, **conversion):
        info = CheckpointInfo(tiny, "a hash", None, VARIANT)
        settings = ConvertSettings(dataclasses.replace(VARIANT, **conversion), "map", None)
        arguments = (random_params(tiny), settings, attentions, [batch] * batches)
        return convert._measured(Parent(tmp_path / path, info), *arguments)

    return of


def test_they_are_measured_once(measured, calibrated):
    measure, seconds = calibrated()
    assert seconds == 0.0  # it is this stage's own time
    once = list(measure)
    assert [m[:2] for m in measure] == [m[:2] for m in once]
    again, seconds = calibrated(grouping="act_cos")
    assert seconds > 0.0
    for one, other in zip(again, once, strict=True):
        np.testing.assert_array_equal(one.keys, other.keys)
    assert len(measured) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"path": "2"},
        {"attentions": ("cross_attention",)},
        {"batches": 2},
        {"space": "attention"},
    ],
)
def test_others_are_measured_anew(measured, calibrated, other):
    for changes in ({}, other, {}):
        measure, seconds = calibrated(**changes)
        assert seconds == 0.0
        assert {m.attention for m in measure} == {*changes.get("attentions", BOTH)}
    assert len(measured) == 3


def test_those_of_a_large_network_are_not_kept(measured, calibrated, monkeypatch):
    monkeypatch.setattr(convert, "LARGEST_KEPT", 0)
    measure, _ = calibrated()
    assert measured == []
    for _ in range(2):
        assert next(iter(measure)).layer == 0
    assert len(measured) == 2


@pytest.mark.filterwarnings("ignore:covariances of layer")  # of few tokens
@pytest.mark.parametrize("sequential", [False, True])
def test_what_heads_attend_to_is_measured_where_it_is_read(
    calibrated, tiny, random_params, batch, sequential
):
    """By "prune", which has no space, and by the space "attention"."""
    params, heads = random_params(tiny), dict.fromkeys(BOTH, 2)
    for how in ({"method": "prune", "space": None}, {"space": "attention", "shrinkage": 0.3}):
        measure, _ = calibrated(sequential=sequential, **how)
        variant = dataclasses.replace(VARIANT, sequential=sequential, **how)
        settings = ConvertSettings(variant, "map", None)
        made = convert._convert(params, tiny, settings, heads, [batch], measure)
        keys = made.params["decoder"]["layers"]["self_attention"]["key"]
        assert keys.shape[2] == 2
        assert np.isfinite(keys).all()


def test_sequential_conversion_takes_its_own(measured, calibrated):
    calibrated(sequential=True)
    calibrated(batches=0)
    assert measured == []
    calibrated(sequential=True, grouping="act_cos")
    assert len(measured) == 1
