"""The token ids that training, batches and search treat differently from all others."""

from typing import NamedTuple


class SpecialTokens(NamedTuple):
    """Three token ids; the defaults are those of T5's own vocabularies.

    MADLAD-400, for example, has pad 1, eos 2 and start 0.

    Attributes:
        pad: fills rows behind their texts. Nothing attends to it and no loss counts it.
        eos: ends every text, of inputs and of targets.
        start: the decoder's first input, before the first target.
    """

    pad: int = 0
    eos: int = 1
    start: int = 0

    @property
    def fields(self) -> dict[str, int]:
        """The tokens by the names that `gqa.Config` has for them."""
        names = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
        return dict(zip(names, self, strict=True))


T5_TOKENS = SpecialTokens()
