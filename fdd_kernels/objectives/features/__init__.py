"""Objectives that compare hidden states without a vocabulary, in plain PyTorch."""
