"""How fast we generate and train, for every number of KV heads, and what the machine can do.

python launch.py --config=configs/sweeps/speed.py          # T5 small with 16 heads, random weights
python launch.py --config=configs/sweeps/speed.py:large    # another size of configs/sizes.py
python launch.py --config=configs/sweeps/speed.py --stage=training    # or inference, or report
python launch.py --config=configs/sweeps/speed.py --config.benchmark.inputs_lengths=1024,2048
python launch.py --config=configs/sweeps/speed.py --config.benchmark.memory_gib=2

Leaves speed.md and speed.png in the workdir. On a CPU, Hugging Face's T5 and CTranslate2 take turns
with us in float32 if `requirements-bench.txt` is installed. Sizes other than nano, mini and the
default compute in bfloat16, which suits accelerators: add --config.model.dtype=float32 on a CPU.
"""

from ml_collections import ConfigDict

from configs import base

VOCAB_SIZE = 4096  # of sizes whose vocabulary depends on a text, which this benchmark has not


def get_config(arg: str = "") -> ConfigDict:
    """Return the benchmark of size `arg`; without one, of T5 small with 16 heads for its 6."""
    config = ConfigDict()
    config.name = f"speed-{arg}" if arg else "speed"
    config.size = arg or "small-16-heads"
    config.experiment = "speed"
    config.model = base.get_config(arg or "small").model.copy_and_resolve_references()
    if not arg:
        config.model.num_heads = 16
        config.model.dtype = "float32"
        config.model.remat = "none"
    config.model.vocab_size = config.model.vocab_size or VOCAB_SIZE
    config.benchmark = ConfigDict()
    # KV heads of decoder self- and cross-attention. (): every number that divides the query heads.
    config.benchmark.kv_heads = ()
    config.benchmark.batch_size = 8
    config.benchmark.inputs_lengths = (1024,)
    config.benchmark.targets_length = 128  # every sequence is this long: none ends early
    config.benchmark.repetitions = 7
    # Also time the largest batch whose KV cache fits into so many GiB of memory beside the weights.
    # 0: time only batch_size.
    config.benchmark.memory_gib = 0.0
    config.benchmark.largest_batch_size = 32  # the largest batch is at most this, as in the paper
    config.training = ConfigDict()
    config.training.networks = ConfigDict()
    for size in ("nano", "mini"):
        config.training.networks[size] = base.get_config(size).model
        config.training.networks[size].vocab_size = VOCAB_SIZE
    pretrain = base.get_config("nano").pretrain
    config.training.batch_size = pretrain.batch_size
    config.training.inputs_length = pretrain.inputs_length
    config.training.targets_length = pretrain.targets_length
    config.training.repetitions = 7
    config.training.steps = 10  # in each repetition
    return config.lock()
