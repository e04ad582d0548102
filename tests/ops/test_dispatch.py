"""Which backend a call takes, and what is said about the others."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from xattn_kernels import cross_attention, explain
from xattn_kernels.core import dispatch
from xattn_kernels.core.dispatch import (
    Backend,
    choose,
    explanation,
    triton_on_cpu,
)
from xattn_kernels.ops.cross_attention import BACKENDS


def backend(name: str, *reasons: str, by_name: bool = False) -> Backend:
    return Backend(name, lambda inputs: list(reasons), lambda inputs: name, by_name)


FAST, SLOW, ORACLE = backend("fast", "too wide"), backend("slow"), backend("oracle", by_name=True)


def test_takes_the_first_that_can():
    assert choose("op", [SLOW, FAST], None, None) is SLOW
    assert choose("op", [FAST, SLOW], None, None) is SLOW
    assert choose("op", [backend("fast"), SLOW], None, None).name == "fast"


def test_by_name_only():
    assert choose("op", [ORACLE, SLOW], None, None) is SLOW
    assert choose("op", [SLOW, ORACLE], None, "oracle") is ORACLE


def test_named_backend_runs_or_gives_its_reasons():
    unable = backend("fast", "too wide", "too long")
    with pytest.raises(RuntimeError, match="op: backend 'fast' cannot .*: too wide; too long"):
        choose("op", [unable, SLOW], None, "fast")


def test_unknown_backend():
    with pytest.raises(ValueError, match="op: unknown backend 'quick'; there are 'fast', 'slow'"):
        choose("op", [FAST, SLOW], None, "quick")


def test_no_backend_lists_all_reasons():
    with pytest.raises(RuntimeError) as refusal:
        choose("op", [FAST, backend("slow", "no mask"), ORACLE], None, None)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "op: no backend can run this call"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "fast too wide", "slow no mask", "oracle can run when asked for: backend='oracle'",
    ]  # fmt: skip


def tensors(*shape: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=dtype) for _ in range(3))


def test_order_of_cross_attention():
    assert [b.name for b in BACKENDS] == ["triton", "cuda", "torch", "eager"]
    assert [b.by_name for b in BACKENDS] == [False, False, False, True]
    x = cross_attention.check(*tensors(1, 2, 3, 16))
    assert choose("", BACKENDS, x, None).name == ("triton" if triton_on_cpu() else "torch")


def test_reasons_of_triton():
    triton = BACKENDS[0]
    wide = triton.reasons(cross_attention.check(*tensors(1, 2, 3, 264, dtype=torch.float64)))
    assert "head width 264 > 256" in wide
    assert "dtype torch.float64 is not float32, float16 or bfloat16" in wide
    for dtype in (torch.float64, torch.float8_e5m2, torch.float8_e4m3fn):
        options = dict(bias=torch.zeros(1, 2, 3, 3, dtype=dtype), scale=torch.ones(2, dtype=dtype))
        said = "; ".join(triton.reasons(cross_attention.check(*tensors(1, 2, 3, 16), **options)))
        assert f"the dtype of bias, {dtype}, is none" in said
        assert (f"the dtype of scale, {dtype}, is none" in said) == (dtype != torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        options = dict(bias=torch.zeros(1, 2, 3, 3, dtype=dtype), scale=torch.ones(2, dtype=dtype))
        x = cross_attention.check(*tensors(1, 2, 3, 16), **options)
        assert "dtype" not in "; ".join(triton.reasons(x))


@pytest.mark.parametrize("version", ["3.4.0", "3.5.1+git0123", "2.10.0"])
def test_an_older_triton_is_a_reason(version, monkeypatch):
    """torch 2.8 and 2.9 bring one."""
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.metadata, "version", lambda name: version)
    reasons = [f"Triton {version} is older than 3.6"]
    assert dispatch.missing_triton() == reasons
    monkeypatch.setattr(dispatch, "MISSING_TRITON", reasons)
    x = cross_attention.check(*tensors(1, 2, 3, 16))
    assert BACKENDS[0].reasons(x) == reasons and choose("", BACKENDS, x, None).name == "torch"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0", None])
def test_a_triton_that_will_do(version, monkeypatch):
    """Or of which nobody knows the version."""

    def version_of(name):
        if version is None or name != "pytorch-triton":
            raise dispatch.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.metadata, "version", version_of)
    assert dispatch.missing_triton() == []


def test_triton_needs_a_gpu_or_a_word(as_users_run_it):
    q, k, v = tensors(1, 2, 3, 16)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot .*on cpu, Triton needs a GPU"):
        cross_attention(q, k, v, backend="triton")


def test_statistics_off_the_gpu_name_every_reason(as_users_run_it):
    """Today only the kernels and eager return statistics: without kernels the call is refused."""
    with pytest.raises(RuntimeError, match="no backend can run this call") as refusal:
        cross_attention(*tensors(1, 2, 3, 16), return_statistics=True)
    for word in ("triton", "torch", "eager", "entropy", "backend='eager'"):
        assert word in str(refusal.value)


def test_explain_runs_nothing_and_says_all(capsys):
    q, k, v = (t.to("meta") for t in tensors(1, 2, 3, 16))
    explain(cross_attention, q, k, v, return_lse=True, backend="eager")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "cross_attention takes 'eager'"
    assert [line.split()[0] for line in rest] == ["triton", "cuda", "torch", "eager"]
    assert "tensors are on meta" in rest[0] and "can run when asked for" in rest[3]


def test_explanation_of_a_backend_that_cannot():
    q, k, v = tensors(1, 2, 3, 16)
    text = explanation(cross_attention, q, k, v, softcap=2.0, backend="torch")
    assert text.startswith("cross_attention cannot run with backend='torch'")


def test_explain_checks_its_arguments():
    with pytest.raises(ValueError, match="dropout_p"):
        explain(cross_attention, *tensors(1, 2, 3, 16), dropout_p=2.0)
    with pytest.raises(TypeError, match="explain needs one of the package's ops, got .*relu"):
        explain(torch.relu, torch.zeros(1))


@pytest.mark.parametrize("name", ["torch", "eager"])
def test_a_named_backend_is_the_one_that_runs(name, monkeypatch):
    ran = []
    spied = tuple(b._replace(run=lambda x, b=b: ran.append(b.name) or b.run(x)) for b in BACKENDS)
    # the function hides the module of its name
    module = import_module("xattn_kernels.ops.cross_attention")
    monkeypatch.setattr(module, "BACKENDS", spied)
    cross_attention(*tensors(1, 2, 3, 16), backend=name)
    assert ran == [name]
