"""`attention_map` against rows of the reference in float64, both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.largest_tensor import LargestTensor
from support.modes import enter_backend, modes
from support.numerics import assert_as_accurate
from support.weights_cases import CASES, NQ, B, exact_in, make
from xattn_kernels import attention_map, attention_weights, cross_attention, masks

pytestmark = pytest.mark.usefixtures("seed")

NAMES = [name for name in CASES if name != "dropout"]
GRID, FIRST = (4, 7), 6
SHARED = [3, -1, 1, 0, 3]
OWN = torch.tensor([[0, 5, 1], [18, -2, 1]])


@pytest.fixture(params=["torch", *modes("interpreter", "gpu")])
def backend(request):
    """ "torch", or "triton" where this process can run it; tensors are made on its device."""
    with enter_backend(request.param) as (name, device), torch.device(device):
        yield name


def leaves_of(case: str, dtype: torch.dtype) -> dict:
    options = {n: exact_in(dtype, t) for n, t in CASES[case]().items()}
    return make(dtype) | {n: t for n, t in options.items() if n not in ("dropout_p", "seed")}


def with_gradients(maps, given: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """`maps(**given)` in dtype and every gradient, by name."""

    def leaf(t):
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().to(dtype).requires_grad_() if is_float else t

    named = {name: leaf(t) for name, t in given.items()}
    found = maps(**named)
    upstream = torch.randn(
        found.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu"
    )
    found.backward(upstream.to(found))
    grads = {f"d{n}": t.grad for n, t in named.items() if isinstance(t, Tensor) and t.requires_grad}
    return {"maps": found.detach()} | grads


def twin(rows, average: bool):
    """Every row's weights, of which some are taken."""

    def maps(**given) -> Tensor:
        weights = attention_weights(**given, backend="eager", average_heads=False)
        index = torch.as_tensor(rows, device=weights.device).expand(B, -1) % NQ
        weights = torch.stack([w[:, i] for w, i in zip(weights, index, strict=True)])
        weights = weights.mean(1) if average else weights
        return weights[..., FIRST : FIRST + 28].unflatten(-1, GRID)

    return maps


@pytest.mark.parametrize("rows", [SHARED, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("case", NAMES)
def test_rows_of_the_reference(case, rows, backend):
    rows = rows.to(torch.get_default_device()) if isinstance(rows, Tensor) else rows
    average, given = rows is not SHARED, leaves_of(case, torch.float32)

    def maps(**named) -> Tensor:
        options = dict(rows=rows, grid=GRID, first_key=FIRST, average_heads=average)
        return attention_map(**named, **options, backend=backend)

    found = with_gradients(maps, given, torch.float32)
    eager, truth = (
        with_gradients(twin(rows, average), given, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name, value in truth.items():
        size = value.abs().sum().item() if name == "dscale" else 0.0
        assert_as_accurate(found[name], eager[name], value, name, size=size)


def test_bfloat16_and_a_known_lse(backend):
    q, k = (t.bfloat16() for t in make(torch.bfloat16).values())
    options = dict(rows=SHARED, grid=GRID)
    known = backend if backend == "triton" else "eager"
    lse = cross_attention(q, k, k, return_lse=True, backend=known).lse
    truth = attention_map(q.double(), k.double(), **options, backend="eager")
    eager = attention_map(q, k, **options, backend="eager")
    for given in (None, lse):
        found = attention_map(q, k, lse=given, **options, backend=backend)
        assert found.dtype == torch.bfloat16
        assert_as_accurate(found, eager, truth, "maps")


def test_a_map_holds_the_share_of_its_image(backend):
    q, k = make().values()
    halves = [
        attention_map(q, k, rows=[2], grid=(3, 6), first_key=first, backend=backend)
        for first in (0, 18)
    ]
    rest = attention_map(q, k, rows=[2], grid=(1, 1), first_key=36, backend=backend)
    torch.testing.assert_close(sum(t.sum((2, 3)) for t in (*halves, rest)), q.new_ones(B, 1))
    mask = masks.padding(torch.tensor([18, 0]))
    seen = attention_map(q, k, rows=[2], grid=(3, 6), mask=mask, backend=backend)
    torch.testing.assert_close(seen.sum((2, 3)), q.new_tensor([[1.0], [0.0]]))


def test_memory_is_of_the_rows_that_are_asked_for():
    N = 512
    q, k = (torch.randn(1, 2, N, 16, requires_grad=True) for _ in "qk")
    with LargestTensor() as largest:
        attention_map(q, k, rows=[0, 7], grid=(16, 32), backend="torch").square().sum().backward()
    assert largest.nbytes <= 2 * N * 16 * 4


@pytest.mark.parametrize(("Nq", "rows"), [(1, [0]), (1, [-1]), (5, [])])
def test_few_rows(Nq, rows, backend):
    q, k = torch.randn(2, 2, Nq, 16), torch.randn(2, 1, 6, 16)
    found = attention_map(q, k, rows=rows, grid=(2, 3), backend=backend)
    assert found.shape == (2, len(rows), 2, 3)
    torch.testing.assert_close(found.sum((2, 3)), torch.ones(2, len(rows)))


def test_compiled():
    q, k = make().values()

    def maps(q, k, rows):
        return attention_map(q, k, rows=rows, grid=GRID, backend="eager")

    compiled = torch.compile(maps, backend="aot_eager", fullgraph=True)
    rows = torch.tensor([4, -1])
    torch.testing.assert_close(compiled(q, k, rows), maps(q, k, rows))


Q, K = torch.zeros(2, 2, 5, 16), torch.zeros(2, 1, 12, 16)
WRONG = {
    "rows must be from -5 to 4, got 5": dict(rows=[0, 5]),
    "rows must be from -5 to 4, got -6": dict(rows=torch.tensor([-6])),
    r"rows must be ints or an integer tensor, got \[True\]": dict(rows=[True]),
    "rows must be ints or an integer tensor, got 3": dict(rows=3),
    "rows must be ints or an int32 or int64 tensor, got torch.bool": dict(rows=torch.ones(5) > 0),
    r"rows must be \[R\] or \[B, R\] with B = 2 on cpu, got \[3, 1\]": dict(
        rows=OWN.new_zeros(3, 1)
    ),
    r"grid must be \(h, w\), two ints, got 12": dict(grid=12),
    r"grid must be of at least one row and column, got \(0, 3\)": dict(grid=(0, 3)),
    r"first_key must be from 0 to Nk - h w = 12 - 12, got 1": dict(first_key=1),
    "first_key must be an int, got float": dict(first_key=0.0),
    r"mask must broadcast to \[B, Hq, Nq, Nk\]": dict(mask=torch.ones(4, 12).bool()),
    r"lse must be \[B, Hq, Nq\]": dict(lse=torch.zeros(2, 2, 2)),
    "average_heads must be a bool, got str": dict(average_heads="no"),
    "unknown backend 'cuda'": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments_are_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        attention_map(Q, K, **dict(rows=[0], grid=(3, 4)) | WRONG[message])
