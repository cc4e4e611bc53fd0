"""Feature Dynamics Distillation: output KD, trajectory and derivative of the logit lens."""
