"""Measure how much a conversion changed the size of the query kernels; reports print it.

The methods of closed_form.py change queries, the methods of pooling.py do not.
"""

import numpy as np
from jaxtyping import Float

from gqa.conversion.calibration import ATTENTIONS
from gqa.model.transformer import each_layer


def query_scale(old: dict, new: dict) -> dict[str, Float[np.ndarray, " L"]]:
    """Return, by attention, the RMS of each layer's query kernel in `new` divided by `old`: [L].

    Adafactor's steps are relative to the size of a parameter, so queries that were scaled up learn
    faster than before. A kernel of zeros in `old` has the scale 1.
    """

    def rms(params: dict, name: str) -> np.ndarray:
        stack, attention = ATTENTIONS[name]
        queries = (layer[attention]["query"] for layer in each_layer(params[stack]))
        return np.sqrt([np.square(np.asarray(x, np.float64)).mean() for x in queries])

    before, after = ({name: rms(params, name) for name in ATTENTIONS} for params in (old, new))
    return {
        name: np.divide(after[name], x, out=np.ones_like(x), where=x > 0)
        for name, x in before.items()
    }
