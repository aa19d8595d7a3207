"""Scores, losses and timings of a trained network, and the records that hold them."""
