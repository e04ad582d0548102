"""How the op behaves under autograd: what it computes when, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from support.calls import (
    assert_agrees,
    build,
    expected,
    run,
    written_out,
)
from support.cases import Case
from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import cross_attention

LENGTHS = {"short": 6, "long": 40}
each_length = pytest.mark.parametrize("Nq", LENGTHS.values(), ids=LENGTHS)
interpreted = pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)


def sized(mode, Nq: int, **flags) -> Case:
    return Case(f"autograd_{Nq}", **mode.sizes | dict(Nq=Nq) | flags)


def forward(call, backend: str = "triton"):
    return cross_attention(**call.leaves, **call.options, backend=backend)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that were launched."""
    from xattn_kernels.triton_kernels import launch

    names = []
    original = launch.Launch.run

    def spy(self, kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)
        return original(self, kernel, *args, **kwargs)

    monkeypatch.setattr(launch.Launch, "run", spy)
    return names


NEEDED = {
    "q": ({"dq_kernel"}, {"dq_kernel"}),
    "k": ({"dq_kernel"}, {"dkdv_kernel"}),
    "v": ({"dq_kernel"}, {"dkdv_kernel"}),
    "bias": ({"dbias_kernel"}, {"dbias_kernel"}),
    "scale": ({"dq_kernel"}, {"dq_kernel"}),
    "kv": ({"dq_kernel"}, {"dkdv_kernel"}),
    "qv": ({"dq_kernel"}, {"dq_kernel", "dkdv_kernel"}),
}


@interpreted
@each_length
@pytest.mark.parametrize("needed", NEEDED)
def test_only_what_is_needed_is_launched(mode, launched, Nq, needed):
    """One tile of rows is one fused kernel for dq, dk and dv; several tiles have one for each.
    (float32 with a bias has no fused kernel.)"""
    names = [needed] if needed in ("bias", "scale") else list(needed)
    c = sized(mode, Nq, bias="11QK", scale=(0.3,), returns="out")
    call = build(c, mode.dtypes[0], mode.device)
    for name, leaf in call.leaves.items():
        leaf.requires_grad_(name in names)
    out = forward(call)
    assert launched == ["forward_kernel"]
    grads = torch.autograd.grad(out, [call.leaves[n] for n in names], call.upstream["out"])
    assert set(launched[1:]) == NEEDED[needed][Nq == LENGTHS["long"]] and len(launched) == 1 + len(
        set(launched[1:])
    )
    eager, truth, size = expected(c, mode.dtypes[0], mode.device)
    for name, gradient in zip(names, grads, strict=True):
        n = f"d{name}"
        assert_as_accurate(gradient, eager[n], truth[n], n, size=size[n], rounded_to=mode.dtypes[0])


@interpreted
def test_nothing_is_kept_without_gradients(mode, launched):
    call = build(sized(mode, 6), mode.dtypes[1], mode.device)
    with torch.no_grad():
        assert not any(t is not None and t.requires_grad for t in forward(call))
    for leaf in call.leaves.values():
        leaf.requires_grad_(False)
    assert not forward(call).out.requires_grad
    assert launched == ["forward_kernel"] * 2


@pytest.mark.taking_turns
@each_length
@pytest.mark.parametrize("used", ["out", "lse", "entropy"])
def test_one_output_used(mode, Nq, used):
    """The other outputs' gradients are absent, not zero tensors."""
    call = written_out(build(sized(mode, Nq, mask="empty_rows"), mode.dtypes[1], mode.device))
    exact = call.in_double()
    found = {}
    for name, backend, c in (
        ("ours", "triton", call),
        ("eager", "eager", call),
        ("truth", "eager", exact),
    ):
        output = getattr(forward(c, backend), used)
        found[name] = torch.autograd.grad(output, [c.leaves[n] for n in "qk"], c.upstream[used])
    for n, *grads in zip("qk", *found.values(), strict=True):
        assert_as_accurate(*grads, f"d{n}", size=1.0, rounded_to=mode.dtypes[1])


@pytest.mark.taking_turns
@each_length
def test_gradient_of_a_sum(mode, Nq):
    """out.sum() gives an expanded gradient, all of whose strides are 0."""
    call = build(sized(mode, Nq, returns="out"), mode.dtypes[1], mode.device)
    call.upstream["out"] = torch.ones_like(call.upstream["out"])
    by_tensor = run(call, "triton")
    forward(call).sum().backward()
    for n, leaf in call.leaves.items():
        assert torch.equal(leaf.grad, by_tensor[f"d{n}"])


@interpreted
@each_length
@pytest.mark.parametrize("how", ["transposed", "every_other", "sliced"])
def test_gradient_of_any_layout(mode, Nq, how):
    call = build(sized(mode, Nq), mode.dtypes[1], mode.device)
    plain = run(call, "triton")
    dout = call.upstream["out"]
    call.upstream["out"] = {
        "transposed": lambda: dout.mT.contiguous().mT,
        "every_other": lambda: torch.stack([dout, dout], -1).flatten(-2)[..., ::2],
        "sliced": lambda: torch.cat([dout, dout], 2)[:, :, :Nq],
    }[how]()
    for row in ("lse", "entropy"):
        call.upstream[row] = call.upstream[row].mT.contiguous().mT
    for n, t in run(call, "triton").items():
        assert torch.equal(t, plain[n]), n


@interpreted
@each_length
def test_inputs_are_left_alone(mode, Nq):
    c = sized(mode, Nq, mask="unsorted", bias="BHQK", scale=(0.3,), dropout_p=0.2)
    call = build(c, mode.dtypes[1], mode.device)
    tensors = [*call.leaves.values(), *call.upstream.values()]
    tensors += [call.options["mask"].start, call.options["mask"].stop]
    before = [t.detach().clone() for t in tensors]
    run(call, "triton")
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(t._version == 0 for t in tensors[: len(call.leaves)])


@pytest.mark.taking_turns
@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 3])
@each_length
def test_two_runs_are_bitwise_equal(mode, Nq, splits, force_splits):
    force_splits(splits)
    flags = dict(mask="unsorted", bias="B11K", scale=(0.3,), dropout_p=0.3, softcap=2.0)
    c = sized(mode, Nq, **flags)
    first, second = (
        run(written_out(build(c, mode.dtypes[0], mode.device)), "triton") for _ in range(2)
    )
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@interpreted
def test_backward_twice(mode):
    call = build(sized(mode, 6), mode.dtypes[1], mode.device)
    result = forward(call)
    outputs = [getattr(result, n) for n in call.upstream]
    arguments = (outputs, list(call.leaves.values()), list(call.upstream.values()))
    first = torch.autograd.grad(*arguments, retain_graph=True)
    second = torch.autograd.grad(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(*arguments)


@interpreted
def test_double_backward_is_refused(mode):
    call = build(sized(mode, 6, returns="out"), mode.dtypes[1], mode.device)
    (dq,) = torch.autograd.grad(
        forward(call), call.leaves["q"], call.upstream["out"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no double backward; use backend='eager'"):
        dq.square().sum().backward()


def test_double_backward_on_eager():
    call = build(Case("double", returns="out"), torch.float64)
    (dq,) = torch.autograd.grad(
        forward(call, "eager"), call.leaves["q"], call.upstream["out"], create_graph=True
    )
    dq.square().sum().backward()
    assert call.leaves["k"].grad.abs().max() > 0


@interpreted
def test_one_tensor_as_all_three(mode):
    """Self-attention of one tensor: its gradient is the sum of three."""
    x = build(sized(mode, 6), mode.dtypes[1], mode.device).leaves["k"]
    whole = cross_attention(x, x, x, backend="triton")
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    dout = torch.randn_like(whole)
    (together,) = torch.autograd.grad(whole, x, dout)
    apart = torch.autograd.grad(cross_attention(*parts, backend="triton"), parts, dout)
    torch.testing.assert_close(together, sum(apart))


SPLIT = [
    (2, {}),
    (3, {}),
    (3, dict(mask="unsorted")),
    (3, dict(mask="blocks")),
    (3, dict(bias="1HQK", dropout_p=0.3)),
    (7, dict(mask="unsorted")),
    (3, dict(layout="BNHD", Hq=4, Hkv=2, Dv=24)),
    (4, dict(layout="sliced", Hq=3, Hkv=1, scale=(0.3, -0.2, 0.1), mask="causal")),
    (3, dict(bias="B1QK", values="bias_minus_1e9", softcap=2.0)),
    (3, dict(values="nan_q")),
    (2, dict(mask="ragged", Nk=300, returns="lse")),
]


@pytest.mark.taking_turns
@pytest.mark.slow
@each_length
@pytest.mark.parametrize(
    ("splits", "flags"), SPLIT, ids=[f"{n}-{'-'.join(f) or 'plain'}" for n, f in SPLIT]
)
def test_loops_shared_by_several_programs(mode, Nq, flags, splits, force_splits):
    """Parts of the keys, some of them empty, are merged to what one program would have computed."""
    force_splits(splits)
    c = sized(mode, Nq, **flags)
    dtype = mode.dtypes[splits % 2]
    ours = run(written_out(build(c, dtype, mode.device)), "triton")
    assert_agrees(ours, c, dtype, mode.device)
