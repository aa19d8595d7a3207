"""Programs compiled ahead of time for accelerators that are not there, as a report."""
