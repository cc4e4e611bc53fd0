"""How much memory a distillation takes: of the loss (`loss.py`), of a step with two models
(`models.py`, `step.py`).
"""
