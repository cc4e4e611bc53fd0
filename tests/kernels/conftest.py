import pytest

from fdd_kernels.backends.cpu import tiling


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Cut the cached logits of small problems into several tiles, as those of large ones are."""
    monkeypatch.setattr(tiling, "MAX_CACHED_COLUMNS", tiling.TILE_COLUMNS)
