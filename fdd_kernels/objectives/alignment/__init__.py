"""Which teacher layer a student layer learns from: costs of all pairs, and weights from costs."""
