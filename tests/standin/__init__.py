"""A driver for machines without a GPU, and what is tested with it."""
