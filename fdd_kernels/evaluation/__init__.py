"""Evaluate models on a held-out text: the metrics of `fdd-kernels evaluate` and of the trainers."""
