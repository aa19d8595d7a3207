"""Accelerators by their data sheets, and programs compiled for them, read from the text of XLA."""
