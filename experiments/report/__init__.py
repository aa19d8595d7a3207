"""From results.jsonl to report.md, report.html and figures."""

import os

# Figures are drawn into files. A notebook names its own backend in the environment of the programs
# that it starts, where matplotlib need not have it and would refuse to be imported.
os.environ["MPLBACKEND"] = "Agg"
