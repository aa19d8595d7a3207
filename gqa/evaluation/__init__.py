"""Scores, losses, timings, and the records they are kept in."""
