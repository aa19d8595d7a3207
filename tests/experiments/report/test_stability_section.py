"""Spikes and rollbacks are listed by seed, where there were any or could have been."""

from experiments.report import stability_section
from experiments.report.summary import Summary
from tests.support.made_results import PARENT, record, score, variant


def trained(settings, stage, spikes=0, rollbacks=0, task=None):
    """The records of one training."""
    return [
        record(settings, stage, "loss_spikes", spikes, "times", task),
        record(settings, stage, "rollbacks", rollbacks, "times", task),
    ]


def rows(records):
    lines = stability_section.section(Summary(records)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return cells[2:]


STABLE = [
    *trained(PARENT, "pretrain"),
    *trained(variant(8), "uptrain"),
    *trained(variant(8), "finetune", task="parameter_qa"),
    score(variant(8), "parameter_qa", 20.0),
]


def test_nothing_is_said_of_stable_trainings_of_a_parent():
    assert rows(STABLE) == []
    assert stability_section.section(Summary([record(PARENT, "pretrain", "steps", 9)])) == ""


def test_counts_are_listed_by_seed():
    scratch = [variant(8, "none", 0.0, seed=seed) for seed in (1, 0)]
    unstable = trained(scratch[0], "pretrain", 2, 3) + trained(scratch[1], "pretrain")
    assert rows(STABLE + unstable) == [
        ["MHA", "pretrain", "0", "0", "0"],
        ["GQA-8 mean, alpha 0.05", "uptrain", "0", "0", "0"],
        ["GQA-8 from scratch", "pretrain", "0, 1", "0, 2", "0, 3"],
    ]


def test_a_network_from_scratch_is_listed_also_where_all_was_stable():
    found = rows(STABLE + trained(variant(8, "none", 0.0), "pretrain"))
    assert ["GQA-8 from scratch", "pretrain", "0", "0", "0"] in found


def test_a_fine_tuning_is_listed_if_it_was_unstable():
    found = rows(STABLE + trained(PARENT, "finetune", 0, 1, task="parameter_qa"))
    assert ["MHA", "finetune parameter_qa", "0", "0", "1"] in found
    assert not any("GQA-8" in row[0] and "finetune" in row[1] for row in found)
