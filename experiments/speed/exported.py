"""Time what `python -m gqa export` writes: grouped T5s in Transformers and in CTranslate2.

    python -m experiments.speed.exported

The decoder of T5 1.1 small with 8 query heads, random weights, and 8, 4 and 1 KV heads, in float32
on this machine's CPU. The networks take turns. The table has the bytes of the cache, and
the time per token beside the multi-head network's in the same library and the same round.
benchmark.py compares our own inference with these libraries.
"""

import argparse
import time
from functools import partial

import numpy as np

from experiments.speed import peers
from gqa import kv_cache
from gqa.evaluation import timing
from gqa.model.config import Config
from gqa.model.transformer import init_params

HEADS, KV_HEADS = 8, (8, 4, 1)
MIB = 2**20


def network(num_kv_heads: int) -> Config:
    """Return T5 1.1 of the size small, with 8 heads where T5 1.1 has 6.

    The encoder has one layer: it must run before each measurement, but is not measured.
    """
    return Config(
        vocab_size=32128,
        d_model=512,
        d_ff=1024,
        num_heads=HEADS,
        head_dim=64,
        num_encoder_layers=1,
        num_decoder_layers=8,
        num_kv_heads_encoder=HEADS,
        num_kv_heads_self_attention=num_kv_heads,
        num_kv_heads_cross_attention=num_kv_heads,
    )


def turn(peer: peers.Peer, tokens: int) -> dict[str, float]:
    """Time a text of one token, and one of `tokens` more; returns the seconds of one token."""
    begin = time.perf_counter()
    peer.generate(1)
    middle = time.perf_counter()
    peer.generate(1 + tokens)
    return {"token": (time.perf_counter() - middle - (middle - begin)) / tokens}


def main() -> None:
    """Time all networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--inputs-length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=12, help="tokens that are timed")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()

    inputs = np.asarray(timing.random_tokens(32128, options.batch, options.inputs_length))
    configs = {K: network(K) for K in KV_HEADS}
    turns: dict[tuple[str, int], timing.Turn] = {}
    for K, config in configs.items():
        params = init_params(config, 0)
        for name in peers.installed():
            peer = peers.build(name, params, config, inputs)
            turns[name, K] = partial(turn, peer, options.tokens)
    seconds = timing.take_turns(turns, options.repetitions)

    print("| | KV heads | cache | time / token | to multi-head |")
    print("| --- | --- | --- | --- | --- |")
    for name, K in sorted(turns, key=lambda entry: (entry[0], -entry[1])):
        times = seconds[name, K]["token"]
        nbytes = kv_cache.kv_cache_bytes(
            configs[K], options.batch, options.inputs_length, 1 + options.tokens
        )
        ratios = times / seconds[name, HEADS]["token"]
        print(
            f"| {peers.TITLES[name]} | {K} | {nbytes / MIB:.1f} MiB "
            f"| {_quartiles(1000 * times, 1)} ms | {_quartiles(ratios, 2)} |"
        )


def _quartiles(values: np.ndarray, digits: int) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
