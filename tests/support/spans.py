"""The inverse of span corruption, by which tests see that nothing of the text was lost."""

import numpy as np

from gqa.data.tokenizer import EOS, NUM_SENTINELS, PAD


def restore(inputs: np.ndarray, targets: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Return the raw text: `inputs` with each sentinel replaced by its span from `targets`."""
    last_sentinel = first_sentinel - NUM_SENTINELS + 1
    spans: dict[int, list[int]] = {}
    for token in targets[targets != PAD]:
        if last_sentinel <= token <= first_sentinel:
            span = spans.setdefault(int(token), [])
        elif token != EOS:
            span.append(int(token))
    text = [spans.get(int(i), [int(i)]) for i in inputs if i not in (PAD, EOS)]
    return np.array([token for span in text for token in span], np.int32)
