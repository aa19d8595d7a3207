"""One training loop for all stages, with its optimizer, losses, divergence checks and progress."""
