"""From a config to a graph of stages keyed by their content."""
