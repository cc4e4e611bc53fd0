"""A finished run of `fdd-kernels distill` for all files here."""

import pytest


@pytest.fixture(scope="session")
def whole(inputs, tmp_path_factory):
    """An uninterrupted run of six steps."""
    from fdd_kernels.cli.distill.run import distill
    from tests.support.commands import options, quiet

    output = tmp_path_factory.mktemp("whole") / "run"
    distill(options(inputs, output), quiet())
    return output
