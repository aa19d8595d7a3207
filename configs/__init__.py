"""Describe a run: one page of settings, sizes, variants and sweeps."""
