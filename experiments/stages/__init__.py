"""One module for each stage, and what stages share."""
