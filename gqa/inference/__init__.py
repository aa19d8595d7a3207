"""Generation: one decoding step, its two layouts of weights and caches, search, whole texts."""
