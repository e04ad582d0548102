"""What the launchers of csrc/ refuse, and what they plan: none of it needs a device."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from benchmarks.harness.machine import RESULTS
from tools.machine_code import cuda_grid
from xattn_kernels.core.call import check_inputs
from xattn_kernels.cuda_kernels import cross_attention, launch
from xattn_kernels.cuda_kernels import gated_residual as gated
from xattn_kernels.ops.cross_attention import cuda_reasons

pytestmark = pytest.mark.skipif(
    launch.extension() is None, reason="the package is built without its CUDA kernels"
)
_cuda = launch.extension()
SIZES = dict(B=2, Hq=4, Hkv=2, Nq=5, Nk=70, D=16, Dv=16)
WRONG_SIZES = [
    *(dict(Nq=0), dict(Nk=0), dict(B=0), dict(D=257), dict(Dv=0), dict(Hkv=3)),
    *(dict(Nq=2**30), dict(Nk=2**31 - 2**16)),
]


def call(start=64, stop=64, bias=0, **sizes):
    """Of tensors at addresses that nobody reads."""
    shape = _cuda.CrossAttentionShape(*(SIZES | sizes).values(), _cuda.DType.float16)
    head, pair = _cuda.HeadTensor(64, [64, 64, 64]), _cuda.PairTensor
    bounds = [_cuda.RowBounds(at, [5, 1]) for at in (start, stop)]
    return _cuda.CrossAttentionCall(
        head, head, head, *bounds, pair(), pair(bias), _cuda.Numbers(), 0, 0, 0, 0.25, 0.0, 1.0,
        shape, False,
    )  # fmt: skip


def forward(n_splits=1, rows=(64, 0, 0, 0), **changes):
    head = _cuda.HeadTensor(64, [64, 64, 64])
    return _cuda.CrossAttentionForwardParams(head, rows, call(**changes), n_splits)


ONE, LSE = (1, 1, 1), (64, 0, 0, 0, 0)


def backward(dk=64, dv=64, bias_sizes=(1, *ONE), dbias=0, splits=ONE, rows=LSE, **changes):
    of = lambda at: _cuda.HeadTensor(at, [64, 64, 64])  # noqa: E731
    params = _cuda.CrossAttentionBackwardParams(
        *map(of, (64, dk, dv, 64, 64)), rows, call(**changes), bias_sizes
    )
    params.dbias = dbias
    params.dq_splits, params.dkdv_splits, params.dbias_splits = splits
    return params


def rows_of(rows, dim, norm="none"):
    row = _cuda.RowTensor(64, [max(dim, 1), 0, 0, 0])
    shape = _cuda.GatedResidualShape(
        rows, [max(rows, 1), 1, 1, 1], dim, _cuda.DType.float16, _cuda.DType.float16,
        getattr(_cuda.Norm, norm), 1e-5, False,
    )  # fmt: skip
    nothing, gate = _cuda.RowTensor(), _cuda.Numbers(64)
    none = _cuda.Numbers()
    return _cuda.GatedResidualForwardParams(row, row, row, row, nothing, gate, none, none, shape)


def assert_refused(op, params):
    with pytest.raises(RuntimeError, match=rf"^{op}: invalid argument \(cudaErrorInvalidValue\)$"):
        getattr(_cuda, f"{op}_plan")(params)


@pytest.mark.parametrize("sizes", WRONG_SIZES, ids=str)
def test_sizes_that_no_kernel_takes(sizes):
    assert_refused("cross_attention_forward", forward(**sizes))
    assert_refused("cross_attention_backward", backward(**sizes))
    assert_refused("topk_selection", _cuda.TopKSelectionParams(64, call(**sizes), 3))
    assert _cuda.cross_attention_forward_splits(call(**sizes), 132) == 1
    assert _cuda.cross_attention_forward_parts(forward(4, **sizes)) == 0
    assert _cuda.cross_attention_backward_parts(backward(**sizes)) == 0


WRONG_FORWARDS = {
    "start without stop": dict(stop=0),
    "stop without start": dict(start=0),
    "no splits": dict(n_splits=0),
    "entropy without max_probability": dict(rows=(64, 0, 64, 0)),
}
WRONG_BACKWARDS = {
    "dk without dv": dict(dv=0),
    "dv without dk": dict(dk=0),
    "no splits": dict(splits=(1, 0, 1)),
    "dbias without bias": dict(dbias=64),
    "dentropy without entropy": dict(rows=(64, 0, 0, 64, 0)),
    "bias of no size": dict(bias=64, bias_sizes=(1, 0, 1, 1)),
}


@pytest.mark.parametrize("name", WRONG_FORWARDS)
def test_forwards_that_lack_something(name):
    assert_refused("cross_attention_forward", forward(**WRONG_FORWARDS[name]))


@pytest.mark.parametrize("name", WRONG_BACKWARDS)
def test_backwards_that_lack_something(name):
    params = backward(**WRONG_BACKWARDS[name])
    assert_refused("cross_attention_backward", params)
    assert _cuda.cross_attention_backward_parts(params) == 0


def test_what_is_valid_is_planned():
    """Or the tests above would refuse everything."""
    assert len(_cuda.cross_attention_forward_plan(forward(2))) == 2
    assert len(_cuda.cross_attention_backward_plan(backward(bias=64, dbias=64))) == 5
    assert len(_cuda.topk_selection_plan(_cuda.TopKSelectionParams(64, call(), 3))) == 1
    assert len(_cuda.gated_residual_forward_plan(rows_of(2, 24))) == 1
    assert _cuda.cross_attention_forward_parts(forward(2)) == 2 * 2 * 4 * 5 * (16 + 4)


def test_more_blocks_than_a_grid_has():
    assert_refused("cross_attention_forward", forward(B=2**25, Hq=64, Hkv=64))
    assert_refused("topk_selection", _cuda.TopKSelectionParams(64, call(B=2**30), 3))
    assert_refused("gated_residual_forward", rows_of(1, 40_000_000))


@pytest.mark.parametrize(("rows", "dim"), [(0, 24), (2, 0)])
def test_rows_that_are_not_there(rows, dim):
    assert_refused("gated_residual_forward", rows_of(rows, dim))


def test_a_row_of_a_norm_is_at_most_as_wide_as_a_block():
    assert_refused("gated_residual_forward", rows_of(2, 8200, "rms"))


def test_static_shared_memory_is_within_what_a_launch_allows_for():
    """Above 48 KiB with the dynamic part it must be asked for, see `StreamQueue`."""
    most = max(row.shared for row in cuda_grid.load(RESULTS / "static"))
    assert 0 < most <= _cuda.MOST_STATIC_SHARED


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("libm.so.6: no GLIBC_2.99"),
            "do not load: libm.so.6: no",
        ),
        (ModuleNotFoundError("none", name="xattn_kernels._cuda"), "has no CUDA kernels"),
    ],
    ids=["does_not_load", "not_built"],
)
def test_an_extension_that_is_not_there_is_a_reason(monkeypatch, error, said):
    """And breaks no import of the package, of which the rest serves."""
    monkeypatch.setattr(launch, "import_module", Mock(side_effect=error))
    module, missing = launch.load()
    assert module is None and len(missing) == 1 and said in missing[0]
    monkeypatch.setattr(launch, "MISSING_EXTENSION", missing)
    assert launch.device_reasons(torch.device("cuda")) == missing
    on_cpu = launch.device_reasons(torch.device("cpu"))
    assert on_cpu == ["tensors are on cpu, CUDA kernels need a GPU"]


def test_a_device_older_than_the_build_is_a_reason(monkeypatch):
    built = Mock(OLDEST_ARCH=_cuda.OLDEST_ARCH, CUDA_VERSION=13000)
    monkeypatch.setattr(launch, "extension", lambda: built)
    monkeypatch.setattr(launch, "driver_version", lambda: 13010)
    oldest = divmod(_cuda.OLDEST_ARCH, 10)
    assert launch.build_reasons(*oldest) == launch.build_reasons(oldest[0] + 3, 0) == []
    assert launch.build_reasons(7, 5) == [
        "compute capability 7.5 < {}.{}, the oldest of this build (XATTN_CUDA_ARCHS)".format(
            *oldest
        )
    ]


@pytest.mark.parametrize(("driver", "said"), [(12080, 1), (13000, 0), (14000, 0)])
def test_a_driver_older_than_the_build_is_a_reason(driver, said, monkeypatch):
    built = Mock(OLDEST_ARCH=80, CUDA_VERSION=13020)
    monkeypatch.setattr(launch, "extension", lambda: built)
    monkeypatch.setattr(launch, "driver_version", lambda: driver)
    text = ["the driver is for CUDA 12.8, this build for 13.2"]
    assert launch.build_reasons(9, 0) == text * said


@pytest.mark.parametrize("tall", ["q", "k"])
def test_more_rows_than_the_kernels_count_are_a_reason(tall, monkeypatch):
    monkeypatch.setenv("XATTN_CUDA_ON_CPU", "1")
    n = 2**31 - 2**16
    one = torch.zeros(1, 1, 1, 16)
    q, k = (one.expand(1, 1, n if tall == name else 1, 16) for name in "qk")
    text = f"{n} queries of a key head, or keys, are more than"
    assert any(text in reason for reason in cuda_reasons(check_inputs(q, k, k)))
    assert not any("more than" in reason for reason in cuda_reasons(check_inputs(one, one, one)))


def test_alignment_is_of_rows_and_their_ends():
    x = torch.zeros(3, 24, dtype=torch.float16)
    assert gated.aligned(x, x.dtype) and gated.aligned(x[:, 8:], x.dtype)
    assert not gated.aligned(x[:, 4:], x.dtype) and not gated.aligned(x[:, :20], x.dtype)
    assert not gated.aligned(torch.zeros(3, 25, dtype=torch.float16)[:, :24], x.dtype)


def test_scales_are_read_as_float32():
    scale = torch.ones(2, dtype=torch.float64)
    assert cross_attention.as_float32(scale).dtype == torch.float32
    assert cross_attention.as_float32(None) is None
