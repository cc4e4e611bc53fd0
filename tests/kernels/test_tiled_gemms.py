"""GEMM libraries alone, which the benchmarks time as a limit (`multiply` of the C++ kernels)."""

import pytest
import torch

from benchmarks import tiled_gemms
from fdd_kernels.backends.cpu import extension

if extension.kernels is None:
    pytest.skip(f"no C++ kernels: {extension.why_missing}", allow_module_level=True)

multiply = extension.kernels.multiply


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 300), (270, 1300, 17)], ids=str)
def test_every_way_gives_the_product(monkeypatch, threads, dtype, shape):
    """ATen multiplies bfloat16 too, slowly: the limit does not count it."""
    brgemm = [tiled_gemms.BRGEMM] * extension.kernels.has_brgemm(dtype == torch.bfloat16)
    monkeypatch.setattr(tiled_gemms, "libraries", lambda *_: [*brgemm, tiled_gemms.MM])
    m, k, n = shape
    generator = torch.Generator().manual_seed(m)
    a, b = (torch.randn(s, generator=generator).to(dtype) for s in ((m, k), (k, n)))
    expected = a.double() @ b.double()
    names = []
    for name, run in tiled_gemms.products(a, b):
        got = run()
        tiled_gemms.check(got, a, b, expected)
        names.append(name)
        with pytest.raises(ValueError, match="differ by"):
            tiled_gemms.check(got + 0.1 * expected.abs().max(), a, b, expected)
    assert len(set(names)) == 4 * (len(brgemm) + 1)


@pytest.mark.parametrize("brgemm", [False, True], ids=["blas", "brgemm"])
def test_small_tiles_and_wrong_operands(brgemm):
    if brgemm and not extension.kernels.has_brgemm(False):
        pytest.skip("no brgemm on this processor")
    a, b, out = torch.randn(7, 9), torch.randn(9, 20), torch.empty(7, 20)
    multiply(a, b, out, (2, 3, 4), brgemm)
    tiled_gemms.check(out, a, b, a.double() @ b.double())
    wrong = [
        ((a, b.bfloat16(), out), "both float32 or both bfloat16"),
        ((a.half(), b.half(), out), "both float32 or both bfloat16"),
        ((a, b, out.double()), "out float32"),
        ((a, b[:8], out), "all contiguous"),
        ((a, b.T.contiguous().T, out), "all contiguous"),
        ((a[:, :8].bfloat16().contiguous(), b[:8].bfloat16(), out), r"\(k / 2, n, 2\)"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            multiply(*arguments, (2, 3, 4), brgemm)
    for tile in ((0, 3, 4), (2, -1, 4), (2, 3, 0)):
        with pytest.raises(ValueError, match="three positive sizes"):
            multiply(a, b, out, tile, brgemm)


def test_libraries_are_those_of_the_processor(monkeypatch):
    def kernels(library: str, *, bf16: bool, brgemm: bool = True) -> type:
        about = {"gemm_library": library, "bf16_gemm": bf16}
        functions = {name: lambda value=value: value for name, value in about.items()}
        return type("Kernels", (), functions | {"has_brgemm": lambda narrow: brgemm})

    cpu, brgemm, mm = torch.device("cpu"), tiled_gemms.BRGEMM, tiled_gemms.MM
    for module, float32, bfloat16 in (
        (kernels("brgemm", bf16=True), [brgemm], [brgemm]),
        (kernels("brgemm", bf16=False), [brgemm], []),
        (kernels("blas", bf16=False), [brgemm, mm], []),
        (kernels("blas", bf16=False, brgemm=False), [mm], []),
        (None, [], []),
    ):
        monkeypatch.setattr(extension, "kernels", module, raising=False)
        assert tiled_gemms.libraries(cpu, torch.float32) == float32
        assert tiled_gemms.libraries(cpu, torch.bfloat16) == bfloat16
        assert tiled_gemms.libraries(cpu, torch.float16) == []
        assert tiled_gemms.libraries(torch.device("cuda"), torch.float32) == []
