"""The pipeline: configs become stages, stages become results, results become a report."""
