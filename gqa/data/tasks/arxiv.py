"""Write the abstract of an arXiv article (Cohan et al., 2018)."""

from gqa.data import tfds
from gqa.data.examples import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rouge1"
LENGTHS = (2048, 512)
PREFIX = "summarize: "

load, check, fingerprint = tfds.task(
    "scientific_papers/arxiv", lambda row: Example(row["article"], (row["abstract"],)), PREFIX
)
