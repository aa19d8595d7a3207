"""Checkpoints on disk: Orbax behind one module, checksums, parameters read piece by piece."""
