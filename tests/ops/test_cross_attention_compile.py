"""The custom ops, torch.compile, torch.export, and the memory that a call takes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support import custom_ops
from support.calls import build, run
from support.cases import Case
from support.modes import modes
from xattn_kernels import KeyInterval, cross_attention, masks
from xattn_kernels.ops.cross_attention import attend

pytestmark = pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)

FLAGS = {
    "plain": dict(returns="out"),
    "interval": dict(mask="causal"),
    "bool": dict(mask="bool_B11K"),
    "bias": dict(bias="1HQK", layout="BNHD"),
    "scale": dict(scale=(0.3, 0.2)),
    "dropout": dict(dropout_p=0.3, softcap=2.0),
}
BASE = dict(B=2, Nq=5, Nk=40)


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_custom_ops(mode, flags, layout):
    case = Case("opcheck", **BASE | flags | dict(layout=layout))
    call = build(case, mode.dtypes[1], mode.device)
    custom_ops.check(custom_ops.launches(attend, call.inputs(), "triton", call.upstream))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(mode, backend):
    """One graph, with the mask built inside it; results and gradients as without the compiler."""

    def model(q, k, v, lengths, bias):
        mask = masks.padding(lengths) & masks.causal(q.shape[2], k.shape[2], device=q.device)
        result = cross_attention(
            q * 2, k, v, mask=mask, bias=bias, return_statistics=True, backend="triton"
        )
        return result.out.relu(), result.entropy

    call = build(Case("compile", **BASE, bias="1HQK"), mode.dtypes[1], mode.device)
    inputs = [call.leaves["q"], call.leaves["k"], call.leaves["v"]]
    inputs += [torch.tensor([3, 30], device=mode.device), call.leaves["bias"]]
    leaves = list(call.leaves.values())
    upstream = [call.upstream["out"], call.upstream["entropy"]]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    outputs = [f(*inputs) for f in (model, compiled)]
    grads = [torch.autograd.grad(o, leaves, upstream) for o in outputs]
    for plain, traced in (*zip(*outputs, strict=True), *zip(*grads, strict=True)):
        torch.testing.assert_close(traced, plain)


def test_torch_compile_takes_a_key_interval(mode):
    """As an argument, and again for another length without another meaning."""

    def model(q, k, v, start, stop):
        return cross_attention(q, k, v, mask=KeyInterval(start, stop), backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for Nq in (5, 9):
        call = build(
            Case("compile_interval", B=2, Nq=Nq, mask="unsorted", returns="out"),
            mode.dtypes[1],
            mode.device,
        )
        q, k, v = (call.leaves[n].detach() for n in "qkv")
        mask = call.options["mask"]
        plain = cross_attention(q, k, v, mask=mask, backend="triton")
        torch.testing.assert_close(compiled(q, k, v, mask.start, mask.stop), plain)


@pytest.mark.parametrize("size", ["B", "Nq", "Nk"])
@pytest.mark.parametrize("op", ["cross_attention", "attention_weights"])
def test_torch_compile_of_nothing(mode, op, size):
    """The gradients that are not needed are several tensors, for a custom op returns no aliases."""
    c = Case("nothing", op=op, needs="q", returns="out", **BASE | {size: 0})
    call = build(c, torch.float32, mode.device)

    def model(**leaves):
        return call.op(**leaves, backend="triton")

    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**call.leaves)
    (dq,) = torch.autograd.grad(out.sum(), call.leaves["q"])
    assert dq.shape == call.leaves["q"].shape and not dq.any()


def test_torch_export(mode):
    """The exported program holds one node for the forward."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            mask = masks.causal(q.shape[2], k.shape[2], device=q.device)
            return cross_attention(q, k, v, mask=mask, backend="triton")

    call = build(Case("export", **BASE, returns="out"), mode.dtypes[1], mode.device)
    inputs = tuple(call.leaves[n].detach() for n in "qkv")
    program = torch.export.export(Model(), inputs)
    nodes = [n for n in program.graph.nodes if "cross_attention" in str(n.target)]
    assert len(nodes) == 1
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


class Allocations(TorchDispatchMode):
    """Bytes of all memory that operators' results take, views of older memory not counted."""

    def __init__(self):
        super().__init__()
        self.nbytes, self.seen = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if all(storage.data_ptr() != s.data_ptr() for s in self.seen):
                    self.nbytes += storage.nbytes()
                    self.seen.append(storage)  # kept, so that no address is used twice
        return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(returns="out"),
        dict(mask="causal"),
        dict(mask="bool_B11K", bias="1H1K", scale=(0.3,)),
        dict(dropout_p=0.3, softcap=2.0, mask="media_last"),
    ],
    ids=["plain", "causal", "broadcast", "dropout"],
)
@pytest.mark.parametrize("splits", [1, 2])
def test_memory_grows_with_rows_and_keys_not_with_pairs(mode, flags, splits, force_splits):
    """Four times the rows and the keys take at most four times the memory, forward and backward."""
    force_splits(splits)
    taken = []
    for n in (40, 160):
        c = Case("memory", B=1, Hq=1, Hkv=1, Nq=n, Nk=n, **flags)
        call = build(c, mode.dtypes[1], mode.device)
        with Allocations() as allocations:
            run(call, "triton")
        taken.append(allocations.nbytes)
    assert taken[1] <= 4.2 * taken[0]


def test_the_count_of_memory_sees_a_score_matrix(mode):
    taken = []
    for n in (40, 160):
        call = build(Case("memory", B=1, Hq=1, Hkv=1, Nq=n, Nk=n), mode.dtypes[1], mode.device)
        with Allocations() as allocations:
            run(call, "eager")
        taken.append(allocations.nbytes)
    assert taken[1] > 8 * taken[0]
