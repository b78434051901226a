"""One training step over many ranks: which rank holds what, and what a layout costs before it is run."""
