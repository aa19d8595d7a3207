"""The recipe for two CPU cores: what configs/base.py has other values for, for small networks."""

from ml_collections import ConfigDict

SIZES = ("pico", "nano", "mini")
MINUTES = ("pico", "nano")  # sizes that train in minutes; the others take hours


def fit(config: ConfigDict) -> None:
    """Shorten every stage for two CPU cores: pico and nano to minutes in all, mini to hours.

    The task is to say words, which a small network learns to do well in that time.
    """
    tiny = config.size in MINUTES
    pretrain, finetune = config.pretrain, config.finetune
    config.compare = "mean@0,svd@0" if tiny else ""

    pretrain.task = "pronounce"
    pretrain.steps = 3000 if tiny else 20_000
    # With far fewer steps than T5's, the learning rate is higher and decays earlier.
    pretrain.scale = 0.5
    pretrain.warmup = 400 if tiny else 2000

    finetune.tasks = "pronounce_en,pronounce_de,pronounce_fr"
    finetune.steps = 100 if tiny else 2000
    finetune.learning_rate = 3e-3
    finetune.dropout_rate = 0.0 if tiny else 0.1  # pico and nano see no example twice

    # Take many small steps; a small batch also fits a CPU's cache. A row holds about seven words.
    for training in (pretrain, finetune):
        training.pack = True
        training.inputs_length, training.targets_length = 80, 64
        training.batch_size = 8
        training.validation_examples = 256
    pretrain.every = pretrain.steps // 5
    finetune.every = finetune.steps // (1 if tiny else 5)

    config.evaluate.examples = 1000
    config.benchmark.inputs_length = 256  # decoding takes over 80% of a sample, as in the paper
    config.benchmark.targets_length = 512
