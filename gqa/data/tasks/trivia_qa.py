"""Answer a trivia question from documents (TriviaQA, reading comprehension).

The question comes first, so that truncation cannot cut it off; then Wikipedia pages and search
results in the dataset's order, as many as fit. Every alias of the answer is a reference. The test
split has no answers.
"""

from gqa.data import tfds
from gqa.data.examples import Example

METRICS = ("f1", "exact_match")
HEADLINE = "f1"
LENGTHS = (2048, 32)
SPLITS = ("train", "validation")


def example(row: dict) -> Example:
    """Make an example whose first target is the answer as it is given; aliases follow."""
    documents = [*row["entity_pages"]["wiki_context"], *row["search_results"]["search_context"]]
    answer = row["answer"]
    return Example(
        f"question: {row['question']} context: {' '.join(documents)}",
        tuple(dict.fromkeys([answer["value"], *answer["aliases"]])),
    )


load, check, fingerprint = tfds.task("trivia_qa/rc", example, splits=SPLITS)
