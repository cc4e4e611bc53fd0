"""Choice of the compared layers."""

import pytest

from fdd_kernels import FDDConfig
from fdd_kernels.hf.layers import layer_grid, paired_layers


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [
        (12, 4, (2, 4, 6, 8)),  # the paper's GPT-2 ...
        (48, 4, (9, 18, 27, 36)),  # ... and GPT-2 XL
        (5, 4, (1, 2, 3, 4)),
        (7, 2, (2, 4)),
        (3, 0, ()),
    ],
)
def test_floor_grid_is_the_papers_rule(depth, count, expected):
    assert layer_grid(depth, count, "floor") == expected


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [(48, 4, (10, 19, 29, 38)), (6, 2, (2, 4)), (6, 5, (1, 2, 3, 4, 5))],
)
def test_linspace_grid_spreads_evenly(depth, count, expected):
    assert layer_grid(depth, count, "linspace") == expected


@pytest.mark.parametrize("grid", ["floor", "linspace"])
@pytest.mark.parametrize("depth", range(1, 40))
def test_every_grid_is_increasing_and_inside_or_refused(grid, depth):
    for count in range(1, 8):
        try:
            layers = layer_grid(depth, count, grid)
        except ValueError as error:
            # Only a model without enough layers, or too short steps, is refused.
            assert depth <= count
            assert f"num_layers={count}" in str(error)  # noqa: PT017
        else:
            assert len(layers) == count
            assert list(layers) == sorted(set(layers))
            assert layers[0] >= 1
            assert layers[-1] < depth


def test_each_model_has_its_own_grid():
    assert paired_layers(FDDConfig(num_layers=4), 12, 48) == ((2, 4, 6, 8), (9, 18, 27, 36))


def test_explicit_layers_win_over_the_grid_and_may_be_embeddings_and_last_block():
    config = FDDConfig(num_layers=1, student_layers=[0, 3, 4], teacher_layers=[0, 5, 9])
    assert paired_layers(config, 4, 9) == ((0, 3, 4), (0, 5, 9))


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [
        ([1, 5], [1, 2], "student_layers"),
        ([1, 2], [2, 1], "teacher_layers"),
        ([2, 2], [1, 2], "student_layers"),
    ],
)
def test_explicit_layers_that_do_not_exist_or_go_back_are_refused(student, teacher, named):
    with pytest.raises(ValueError, match=named):
        paired_layers(FDDConfig(student_layers=student, teacher_layers=teacher), 4, 4)


def test_layers_must_be_paired():
    with pytest.raises(ValueError, match="together"):
        FDDConfig(student_layers=[1])
    with pytest.raises(ValueError, match="paired by rank"):
        FDDConfig(student_layers=[1], teacher_layers=[1, 2])
