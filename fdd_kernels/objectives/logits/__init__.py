"""Objectives of the final logits, one file each, computed in row blocks."""
