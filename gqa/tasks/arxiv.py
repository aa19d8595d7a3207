"""Write the abstract of a arXiv article (Cohan et al., 2018)."""

from gqa import prepared
from gqa.tasks import Example

METRICS = ("rouge1", "rouge2", "rougeL")
HEADLINE = "rouge1"
LENGTHS = (2048, 512)
PREFIX = "summarize: "

load, check, fingerprint = prepared.task(
    "scientific_papers/arxiv", lambda row: Example(row["article"], (row["abstract"],)), PREFIX
)
