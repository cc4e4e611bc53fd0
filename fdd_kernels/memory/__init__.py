"""Predict memory: of the loss (`loss.py`) and of a training step (`models.py`, `step.py`)."""
