"""What the launchers of csrc/ refuse, and what they plan: none of it needs a device."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from benchmarks.harness.machine import RESULTS
from support.modes import needs_extension
from tools.machine_code import cuda_grid
from xattn_kernels.core.tensor_arguments import check_attention
from xattn_kernels.cuda_kernels import cross_attention, launch
from xattn_kernels.cuda_kernels import gated_residual as gated
from xattn_kernels.ops.cross_attention import cuda_reasons

pytestmark = needs_extension
_cuda = launch.extension()
SIZES = dict(B=2, Hq=4, Hkv=2, Nq=5, Nk=70, D=16, Dv=16)
WRONG_SIZES = [
    *(dict(Nq=0), dict(Nk=0), dict(B=0), dict(D=257), dict(Dv=0), dict(Hkv=3)),
    *(dict(Nq=2**30), dict(Nk=2**31 - 2**16)),
]


def heads(data=64):
    return _cuda.HeadTensor(data=data, strides=[64, 64, 64])


def call(start=64, stop=64, bias=0, **sizes):
    """Of tensors at addresses that nobody reads."""
    shape = _cuda.CrossAttentionShape(**SIZES | sizes, dtype=_cuda.DType.float16)
    return _cuda.CrossAttentionCall(
        q=heads(), k=heads(), v=heads(), scale=0.25, keep_scale=1.0, shape=shape,
        start=_cuda.RowBounds(data=start, strides=[5, 1]),
        stop=_cuda.RowBounds(data=stop, strides=[5, 1]),
        bias=_cuda.PairTensor(data=bias),
    )  # fmt: skip


def forward(n_splits=1, entropy=0, **changes):
    return _cuda.CrossAttentionForwardParams(
        out=heads(), lse=64, entropy=entropy, call=call(**changes), n_splits=n_splits
    )


def backward(dk=64, dv=64, bias_sizes=(1, 1, 1, 1), dkdv_splits=1, dentropy=0, dbias=0, **changes):
    return _cuda.CrossAttentionBackwardParams(
        dq=heads(), dk=heads(dk), dv=heads(dv), dbias=dbias, out=heads(), dout=heads(), lse=64,
        dentropy=dentropy, call=call(**changes), bias_sizes=bias_sizes, dq_splits=1,
        dkdv_splits=dkdv_splits, dbias_splits=1,
    )  # fmt: skip


def selection(**changes):
    return _cuda.TopKSelectionParams(bits=64, call=call(**changes), top_k=3)


def rows_of(rows, dim, norm="none"):
    row = _cuda.RowTensor(data=64, strides=[max(dim, 1), 0, 0, 0])
    shape = _cuda.GatedResidualShape(
        rows=_cuda.RowSizes(rows=rows, sizes=[max(rows, 1), 1, 1, 1]), dim=dim,
        x_dtype=_cuda.DType.float16, h_dtype=_cuda.DType.float16, norm=getattr(_cuda.Norm, norm),
        eps=1e-5,
    )  # fmt: skip
    gate = _cuda.Numbers(data=64)
    return _cuda.GatedResidualForwardParams(y=row, normed=row, x=row, h=row, gate=gate, shape=shape)


def assert_refused(op, params):
    with pytest.raises(RuntimeError, match=rf"^{op}: invalid argument \(cudaErrorInvalidValue\)$"):
        getattr(_cuda, f"{op}_plan")(params)


@pytest.mark.parametrize("sizes", WRONG_SIZES, ids=str)
def test_sizes_that_no_kernel_takes(sizes):
    assert_refused("cross_attention_forward", forward(**sizes))
    assert_refused("cross_attention_backward", backward(**sizes))
    assert_refused("topk_selection", selection(**sizes))
    assert _cuda.cross_attention_forward_splits(call(**sizes), 132) == 1
    assert _cuda.cross_attention_forward_parts(forward(4, **sizes)) == 0
    assert _cuda.cross_attention_backward_parts(backward(**sizes)) == 0


WRONG_FORWARDS = {
    "start without stop": dict(stop=0),
    "stop without start": dict(start=0),
    "no splits": dict(n_splits=0),
    "entropy without max_probability": dict(entropy=64),
}
WRONG_BACKWARDS = {
    "dk without dv": dict(dv=0),
    "dv without dk": dict(dk=0),
    "no splits": dict(dkdv_splits=0),
    "dbias without bias": dict(dbias=64),
    "dentropy without entropy": dict(dentropy=64),
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
    assert len(_cuda.topk_selection_plan(selection())) == 1
    assert len(_cuda.gated_residual_forward_plan(rows_of(2, 24))) == 1
    assert _cuda.cross_attention_forward_parts(forward(2)) == 2 * 2 * 4 * 5 * (16 + 4)


def test_more_blocks_than_a_grid_has():
    assert_refused("cross_attention_forward", forward(B=2**25, Hq=64, Hkv=64))
    assert_refused("topk_selection", selection(B=2**30))
    assert_refused("gated_residual_forward", rows_of(1, 40_000_000))


@pytest.mark.parametrize(("rows", "dim"), [(0, 24), (2, 0)])
def test_rows_that_are_not_there(rows, dim):
    assert_refused("gated_residual_forward", rows_of(rows, dim))


def test_a_row_of_a_norm_is_at_most_as_wide_as_a_block():
    assert_refused("gated_residual_forward", rows_of(2, 8200, "rms"))


PARAMS = sorted(
    name for name, kind in (vars(_cuda) if _cuda else {}).items()
    if isinstance(kind, type) and not hasattr(kind, "__members__")
)  # fmt: skip


def fields_of(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if isinstance(value, property)]


def plain(value):
    """A params struct as nested dicts, which compare by value."""
    if (fields := fields_of(type(value))) and type(value).__name__ in PARAMS:
        return {name: plain(getattr(value, name)) for name in fields}
    return value


def other_value(value, n: int):
    """A value of the same kind that is not the default, different for each n."""
    if isinstance(value, list):
        return [n * 10 + k for k in range(len(value))]
    if type(value).__name__ in PARAMS:
        kind, first = type(value), fields_of(type(value))[0]
        return kind(**{first: other_value(getattr(value, first), n)})
    if hasattr(value, "__members__"):
        return list(type(value).__members__.values())[1]
    return type(value)(n + 1)


@pytest.mark.parametrize("name", PARAMS)
def test_params_are_set_by_name_alone(name):
    """Each field that is given is the one of that name, and no other changes."""
    kind = getattr(_cuda, name)
    default = plain(kind())
    assert default
    values = {field: other_value(getattr(kind(), field), n) for n, field in enumerate(default)}
    for field, value in values.items():
        assigned = kind()
        setattr(assigned, field, value)
        expected = default | {field: plain(value)}
        assert plain(value) != default[field]
        assert plain(kind(**{field: value})) == plain(assigned) == expected
    assert plain(kind(**values)) == {field: plain(value) for field, value in values.items()}


@pytest.mark.parametrize("name", PARAMS)
def test_a_wrong_field_is_an_error_that_names_it(name):
    kind = getattr(_cuda, name)
    with pytest.raises(TypeError, match=rf"^{name} has no field 'sclae'$"):
        kind(sclae=1)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        kind(1)
    with pytest.raises(AttributeError, match="sclae"):
        kind().sclae = 1


def test_a_wrong_value_is_an_error_that_names_the_field():
    with pytest.raises(TypeError, match=r"^HeadTensor\.strides cannot be \(1, 2\)$"):
        _cuda.HeadTensor(strides=(1, 2))
    with pytest.raises(TypeError, match=r"^CrossAttentionShape\.B cannot be 'two'$"):
        _cuda.CrossAttentionShape(B="two")


def test_a_nested_struct_is_changed_in_its_place():
    params = forward()
    params.call.shape.Nq = 7
    assert params.call.shape.Nq == 7


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
    assert any(text in reason for reason in cuda_reasons(check_attention(q, k, k)))
    assert not any("more than" in reason for reason in cuda_reasons(check_attention(one, one, one)))


def test_alignment_is_of_rows_and_their_ends():
    x = torch.zeros(3, 24, dtype=torch.float16)
    assert gated.aligned(x, x.dtype) and gated.aligned(x[:, 8:], x.dtype)
    assert not gated.aligned(x[:, 4:], x.dtype) and not gated.aligned(x[:, :20], x.dtype)
    assert not gated.aligned(torch.zeros(3, 25, dtype=torch.float16)[:, :24], x.dtype)


def test_scales_are_read_as_float32():
    q = torch.ones(1, 2, 3, 16)
    call = check_attention(q, q, q, scale=torch.ones(2, dtype=torch.float64))
    assert cross_attention.readable(call).scale_tensor.dtype == torch.float32
    call = check_attention(q, q, q)
    assert cross_attention.readable(call) is call
