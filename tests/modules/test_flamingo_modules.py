"""The Flamingo modules beyond the recordings: other models' flavours, arguments, corner cases."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.flamingo import DIM, FLAVOURS, SIZES, VISUAL, B, block, brute_force, call, run
from support.modes import modes, needs_extension
from support.numerics import assert_as_accurate
from xattn_kernels import GatedCrossAttentionBlock, MaskedCrossAttention

pytestmark = pytest.mark.usefixtures("seed")

each_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


def assert_definition(flavour, dtype, backend, device="cpu"):
    exact = block(flavour, backend=backend).to(device)
    inputs = [t.detach().to(device) for t in call()]
    found = []
    for kind in (torch.float64, dtype):
        module = copy.deepcopy(exact).to(kind)
        x, media = (t.to(kind).requires_grad_() for t in inputs[:2])
        definition = lambda *a, m=module: brute_force(m, flavour, *a)  # noqa: E731
        found.append(run(definition, module, x, media, inputs[2]))
    found.append(run(module, module, x, media, inputs[2]))
    for name, truth in found[0].items():
        assert_as_accurate(found[2][name], found[1][name], truth, name)


@each_flavour
@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flavours_by_definition(flavour, backend, dtype):
    assert_definition(flavour, dtype, backend)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@each_flavour
def test_flavours_from_the_kernels(mode, flavour):
    assert_definition(flavour, torch.float32, "triton", mode.device)


@needs_extension
@pytest.mark.parametrize("mode", modes("cuda_sm_80", "cuda_gpu"), indirect=True)
@each_flavour
def test_flavours_from_the_cuda_kernels(mode, flavour):
    assert_definition(flavour, torch.float32, "cuda", mode.device)


@pytest.mark.parametrize("backend, gates", [("eager", "eager"), ("torch", "eager"), (None, None)])
def test_backend_reaches_every_op_and_masks_are_intervals(backend, gates, monkeypatch):
    asked = []
    for name in ("cross_attention", "gated_residual"):
        module = sys.modules[f"xattn_kernels.ops.{name}"]

        def spy(op, backends, x, name, original=module.run):
            asked.append((op, name))
            assert op != "cross_attention" or x.start is not None and x.mask is None
            return original(op, backends, x, name)

        monkeypatch.setattr(module, "run", spy)
    block(backend=backend)(*call())
    ops = ("cross_attention", backend), ("gated_residual_norm", gates), ("gated_residual", gates)
    assert asked == list(ops)


@each_flavour
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gates_are_the_identity_and_can_open(flavour, dtype):
    module = GatedCrossAttentionBlock(**SIZES, **FLAVOURS[flavour], dtype=dtype)
    assert not any(g.any() for g in module.gates().values())
    inputs = call(dtype)
    found = run(module, module, *inputs)
    assert torch.equal(found["out"], inputs[0])
    assert found["dattn_gate"].any() and found["dff_gate"].any()
    with torch.no_grad():
        module.attn_gate.fill_(0.5)
    gates = module.gates()
    assert not gates["attn_gate"].requires_grad
    assert torch.equal(gates["attn_gate"], module.attn_gate.detach().tanh())
    assert gates["attn_gate"].shape == gates["ff_gate"].shape == module.ff_gate.shape


def test_copies_and_state_dicts():
    module, inputs = block("llama_meta"), call()
    expected = run(module, module, *inputs)
    other = GatedCrossAttentionBlock(**SIZES, **FLAVOURS["llama_meta"], dtype=torch.float64)
    other.load_state_dict(module.state_dict(), strict=True)
    keep = module.cache_media(inputs[1])
    for same in (other, copy.deepcopy(module)):
        for name, t in run(same, same, *inputs).items():
            assert torch.equal(t, expected[name]), name
    assert keep.made_with.tensors[0] is module.attn.to_kv.weight


@pytest.mark.parametrize("flavour", ["flamingo", "llama_meta", "idefics"])
def test_autocast(flavour):
    module, (x, media, locations) = block(flavour, torch.float32), call(torch.float32)
    expected = module(x, media, locations)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error", UserWarning)
        out = module(x, media, locations)
        from_cache = module(x, module.cache_media(media), locations)
    assert out.dtype == torch.float32 and torch.equal(out, from_cache)
    assert 0 < (out - expected).abs().max() < 0.05 * expected.abs().max()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@each_flavour
def test_little_text_and_no_media(flavour):
    module, (x, media, locations) = block(flavour), call()
    assert module(x[:, :0], media, locations[:, :0]).shape == (B, 0, DIM)
    after_nothing = module(x[:, :1], media, locations[:, :0], use_cached_media=True)
    one = module(x[:, :1], media, locations[:, :1])
    assert torch.equal(one, after_nothing) and not locations[:, 0].any()
    whole = module(x, media, locations)
    assert_as_accurate(one, whole[:, :1], whole[:, :1])
    for none in (media[:, :0], media[:, :, :0]):
        for where in (locations, None):
            found = run(module, module, x, none, where)
            assert not module.attn(x, none, where).any()
            assert not found["dattn_gate"].any() and found["dx"].isfinite().all()
            assert module.ff_without_media == bool(found["dff_gate"].any())


@pytest.mark.parametrize("cached", [True, False])
def test_gradient_checkpointing(cached):
    module, (x, media, locations) = block("llama_hugging_face"), call()
    read = module.cache_media if cached else lambda media: media

    def f(x, media, where):
        return checkpoint(module, x, read(media), where, use_reentrant=False)

    expected = run(module, module, x, media, locations)
    for name, t in run(f, module, x, media, locations).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["flamingo", "llama_meta"])
def test_compiled(flavour):
    module, inputs = block(flavour, backend="eager"), call()
    expected = run(module, module, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for name, t in run(compiled, module, *inputs).items():
        torch.testing.assert_close(t, expected[name])
    x, media, locations = inputs
    cache = module.cache_media(media)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cache, locations), expected["out"])
    torch.nn.init.ones_(module.attn.to_kv.weight)
    with pytest.raises(ValueError, match="media is a cache made before"):
        compiled(x, cache, locations)


def changed(**new):
    """A call with some of its arguments replaced."""

    def change(x, media, media_locations):
        call = dict(x=x, media=media, media_locations=media_locations)
        return call | {k: f(call[k]) if callable(f) else f for k, f in new.items()}

    return change


WRONG_CALLS = {
    "x rank": (changed(x=lambda x: x[0]), r"x must be \[B, N, dim\] with dim = 24, got \[9, 24\]"),
    "x width": (changed(x=lambda x: x[..., :9]), r"dim = 24, got \[2, 9, 9\]"),
    "x dtype": (changed(x=lambda x: x.int()), "x must be a floating-point .* a torch.int32 tensor"),
    "x other dtype": (
        changed(x=lambda x: x.float()), "x must have the dtype of the weights, torch.float64, got"
    ),
    "media other dtype": (
        changed(media=lambda m: m.half()), "media must have the dtype of the weights, .*float16"
    ),
    "media device": (
        changed(media=lambda m: m.to("meta")), "media must be on the device of the weights, cpu"
    ),
    "media rank": (changed(media=lambda m: m[:, 0]), r"media must be \[B, T, n, dim_visual\]"),
    "media width": (changed(media=lambda m: m[..., :5]), r"dim_visual = 12, got \[2, 3, 4, 5\]"),
    "media none": (changed(media=None), "media must be a floating-point tensor .*, got NoneType"),
    "batch": (changed(media=lambda m: m[:1]), "the batch of x, 2, must be that of media, 1"),
    "locations dtype": (
        changed(media_locations=lambda m: m.int()), "must be a bool tensor, got a torch.int32"
    ),
    "locations type": (changed(media_locations=[True]), "must be a bool tensor, got list"),
    "locations short": (
        changed(media_locations=lambda m: m[:, :-1]), r"\[B, N\] = \[2, 9\], .* got \[2, 8\]; use_c"
    ),
    "locations long": (
        changed(x=lambda x: x[:, 1:]), r"\[B, N\] = \[2, 8\], one for each token of x, got \[2, 9\]"
    ),
    "locations batch": (
        changed(media_locations=lambda m: m[:1], use_cached_media=True), r"B = 2, got \[1, 9\]"
    ),
    "cached": (changed(use_cached_media="no"), "use_cached_media must be a bool, got str"),
    "locations device": (
        changed(media_locations=lambda m: m.to("meta")), "on the device of x, cpu, got meta"
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_wrong_calls(wrong):
    change, message = WRONG_CALLS[wrong]
    module = block()
    for called in (module, module.attn.sees_media, module.attn):
        with pytest.raises((TypeError, ValueError), match=message):
            called(**change(*call()))


WRONG_OPTIONS = {
    "dim must be an int, got float": dict(dim=8.0),
    "heads must be at least 1, got 0": dict(heads=0),
    "kv_heads must divide heads = 4, got 3": dict(kv_heads=3),
    "norm must be one of 'layer', 'rms', got 'batch'": dict(norm="batch"),
    "ff must be one of 'gelu', 'swiglu', got 'relu'": dict(ff="relu"),
    "without_media must be one of None, 'empty', 'all', got 'mean'": dict(without_media="mean"),
    "backend must be one of None, 'triton', 'cuda', 'torch', 'eager', got 'flash'": dict(
        backend="flash"
    ),
    "ff_mult must make dim": dict(ff_mult=0),
    "ff_mult must be a number, got str": dict(ff_mult="2"),
    "ff_mult must make dim . ff_mult at least 1, got inf": dict(ff_mult=float("inf")),
    "norm_eps must be a number, got str": dict(norm_eps="a"),
    "norm_eps must be a positive number, got -1": dict(norm_eps=-1),
    "vector_gate must be a bool, got str": dict(vector_gate="no"),
    "only_attend_immediate_media must be a bool": dict(only_attend_immediate_media="no"),
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options(message):
    with pytest.raises((TypeError, ValueError), match=message):
        GatedCrossAttentionBlock(**SIZES | WRONG_OPTIONS[message])


def test_defaults_are_the_originals():
    attn = MaskedCrossAttention(dim=DIM)
    assert list(attn.state_dict()) == [
        "norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight",
    ]  # fmt: skip
    assert attn.to_kv.weight.shape == (2 * 8 * 64, DIM)
    module = GatedCrossAttentionBlock(dim=DIM, dim_visual=VISUAL)
    assert module.ff[1].weight.shape == (4 * DIM, DIM) and module.attn_gate.shape == (1,)
    assert module.attn.to_kv.weight.shape == (2 * 8 * 64, VISUAL)
