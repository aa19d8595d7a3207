r"""T5 XXL on the paper's 8 TPU v4 chips for every number of KV heads, compiled without hardware.

pip install -r requirements-aot.txt                           # TPU compiler: 213 MB, 716 unpacked
python launch.py --config=configs/sweeps/aot.py               # minutes to half an hour on two cores
python launch.py --config=configs/sweeps/aot.py --config.aot.target=v5p-16

pip install "jax[cuda12]==0.10.2"                             # the compiler for H100, 6 GB
python launch.py --config=configs/sweeps/aot.py --config.aot.target=h100-8 \
    "--config.aot.training_targets=()"

Leaves report.md and sample_seconds.png in the workdir. Training is compiled for the first slice of
`aot.training_targets` that holds it.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """Return the analysis of size `arg`; without one, of T5 XXL."""
    config = base.get_config(arg or "xxl").unlock()
    config.name = f"aot-{config.size}"
    config.experiment = "aot"
    config.aot.target = "v4-16"  # Cloud's name for 8 chips
    config.aot.kv_heads = (1, 4, 8, 16, 32, 64)
    config.aot.training_targets = ("v4-128", "v4-256", "v4-512")
    return config.lock()
