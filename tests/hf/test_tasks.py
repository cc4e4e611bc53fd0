"""Masked LMs and encoder-decoders in the lens: their positions, labels and layers."""

import pytest

from fdd_kernels import FDDConfig
from tests.support.dense import compare_with_dense
from tests.support.tasks import FAMILIES, batch_of, dense_terms_of, pair

CONFIG = FDDConfig(num_layers=2, ce_weight=0.5, alpha=0.7, beta=1.3, output_kd_weight=0.9)
LAYERS = (1, 2), (2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_dense_loss(family):
    compare_with_dense(
        *pair(family),
        batch_of(family),
        CONFIG,
        dense=dense_terms_of(family, *LAYERS),
        rtol=1e-6,
        atol=1e-8,
    )
