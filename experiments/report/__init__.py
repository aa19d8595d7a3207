"""From results.jsonl to report.md, report.html and figures."""
