"""`MultiheadAttention` against `nn.MultiheadAttention`: every option, both directions."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import masks
from xattn_kernels.modules import MultiheadAttention

pytestmark = pytest.mark.usefixtures("seed")

B, H, NQ, NK, E = 2, 4, 5, 7, 32

CONSTRUCTORS = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "kdim": {"kdim": 12, "vdim": 20},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "everything": {
        "kdim": 12, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True,
    },
}  # fmt: skip


def forbidden(*shape):
    """A bool mask in torch's sense that leaves the first key to every row."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def additive(*shape):
    return torch.randn(shape, dtype=torch.float64).masked_fill(forbidden(*shape), -torch.inf)


CALLS = {
    "plain": lambda: {},
    "per_head": lambda: {"average_attn_weights": False},
    "padding_bool": lambda: {"key_padding_mask": forbidden(B, NK)},
    "padding_float": lambda: {"key_padding_mask": additive(B, NK)},
    "attn_bool": lambda: {"attn_mask": forbidden(NQ, NK)},
    "attn_float": lambda: {"attn_mask": additive(NQ, NK)},
    "attn_bool_3d": lambda: {"attn_mask": forbidden(B * H, NQ, NK)},
    "attn_float_3d": lambda: {"attn_mask": additive(B * H, NQ, NK)},
    "both_bool": lambda: {
        "attn_mask": forbidden(NQ, NK), "key_padding_mask": forbidden(B, NK),
    },
    "both_float": lambda: {
        "attn_mask": additive(B * H, NQ, NK), "key_padding_mask": additive(B, NK),
    },
    "mixed": lambda: {"attn_mask": additive(NQ, NK), "key_padding_mask": forbidden(B, NK)},
    "causal_hint": lambda: {
        "attn_mask": torch.ones(NQ, NK, dtype=torch.bool).triu(1), "is_causal": True,
    },
    "causal_hint_padding": lambda: {
        "attn_mask": torch.ones(NQ, NK, dtype=torch.bool).triu(1), "is_causal": True,
        "key_padding_mask": forbidden(B, NK),
    },
}  # fmt: skip


def pair(dtype=torch.float64, backend=None, **options):
    """torch's module and ours with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    ours = MultiheadAttention(E, H, dtype=dtype, backend=backend, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(module, batched=True):
    def leaf(n, width):
        batch = (B, n) if module.batch_first else (n, B)
        return torch.randn(*(batch if batched else (n,)), width, dtype=torch.float64)

    return leaf(NQ, E), leaf(NK, module.kdim), leaf(NK, module.vdim)


def run(module, tensors, call, dtype):
    """Outputs, weights and the gradients of every input, parameter and float mask, by name."""
    module = copy.deepcopy(module).to(dtype)

    def to(t):
        if not isinstance(t, torch.Tensor) or t.dtype == torch.bool:
            return t
        return t.detach().to(dtype).requires_grad_()

    memo = {id(t): to(t) for t in tensors}
    leaves = [memo[id(t)] for t in tensors]
    call = {name: to(value) for name, value in call.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        out, weights = module(*leaves, **call)
    results = {"out": out} if weights is None else {"out": out, "weights": weights}
    torch.manual_seed(1)
    loss = sum(
        (r.double() * torch.randn(r.shape, dtype=torch.float64)).sum() for r in results.values()
    )
    loss.backward()
    named = dict(zip(("query", "key", "value"), leaves, strict=True), **call)
    named |= dict(module.named_parameters())
    grads = {f"d{n}": t.grad for n, t in named.items() if isinstance(t, torch.Tensor)}
    return results | {n: g for n, g in grads.items() if g is not None}


def assert_same(theirs, ours, tensors, call, dtype=torch.float64):
    truth = run(theirs, tensors, call, torch.float64)
    eager, mine = run(theirs, tensors, call, dtype), run(ours, tensors, call, dtype)
    assert mine.keys() == truth.keys()
    for name, value in truth.items():
        assert_as_accurate(mine[name], eager[name], value, name)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_same_results_and_gradients(constructor, call, need_weights):
    theirs, ours = pair(**CONSTRUCTORS[constructor])
    call = CALLS[call]() | {"need_weights": need_weights}
    assert_same(theirs, ours, inputs(theirs), call)


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("call", ["plain", "per_head", "both_bool", "attn_float_3d"])
def test_a_named_backend_gives_the_same_gradients(backend, call):
    theirs, ours = pair(backend=backend)
    assert_same(theirs, ours, inputs(theirs), CALLS[call]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", ["plain", "both_bool", "attn_float_3d", "causal_hint"])
def test_same_results_in_lower_precision(dtype, call):
    theirs, ours = pair(dtype, backend="torch")
    assert_same(theirs, ours, inputs(theirs), CALLS[call](), dtype)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("call", ["plain", "both_bool", "attn_float_3d", "causal_hint"])
@pytest.mark.parametrize("need_weights", [pytest.param(True, marks=pytest.mark.slow), False])
def test_same_results_from_the_kernels(mode, need_weights, call):
    with torch.device(mode.device):
        theirs, ours = pair(torch.float32, backend="triton")
        call = CALLS[call]() | {"need_weights": need_weights}
        assert_same(theirs, ours, inputs(theirs), call, torch.float32)


@pytest.mark.parametrize("call", ["plain", "per_head", "padding_bool", "attn_bool_3d"])
@pytest.mark.parametrize("constructor", ["plain", "batch_first", "everything"])
def test_unbatched(constructor, call):
    theirs, ours = pair(**CONSTRUCTORS[constructor])
    call = CALLS[call]()
    if "key_padding_mask" in call:
        call["key_padding_mask"] = call["key_padding_mask"][0]
    if "attn_mask" in call and call["attn_mask"].dim() == 3:
        call["attn_mask"] = call["attn_mask"][:H]
    assert_same(theirs, ours, inputs(theirs, batched=False), call)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_shared_inputs(bias, batch_first):
    theirs, ours = pair(bias=bias, batch_first=batch_first)
    query, key, _ = inputs(theirs)
    assert_same(theirs, ours, (query, key, key), {})
    assert_same(theirs, ours, (query, query, query), {})
    assert_same(theirs, ours, (query, query, torch.randn_like(query)), {})


def test_signatures_state_and_initialisation():
    def parameters(function):
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    for name in ("__init__", "forward"):
        assert parameters(getattr(MultiheadAttention, name)) == parameters(
            getattr(nn.MultiheadAttention, name)
        )
    for options in CONSTRUCTORS.values():
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(3)
        ours = MultiheadAttention(E, H, **options)
        mine, expected = ours.state_dict(), theirs.state_dict()
        assert list(mine) == list(expected)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
        theirs.load_state_dict(mine, strict=True)
        assert vars(theirs).keys() - {"bias_k", "bias_v"} <= vars(ours).keys()


each_masked_row = pytest.mark.parametrize(
    "call", ["padding_bool", "padding_float", "attn_bool", "attn_float"]
)


@each_masked_row
@pytest.mark.parametrize("average", [True, False])
def test_rows_without_keys_give_the_output_bias(call, average):
    assert_rows_without_keys(pair()[1], torch.float64, call, average)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@each_masked_row
def test_rows_without_keys_from_the_kernels(mode, call):
    with torch.device(mode.device):
        assert_rows_without_keys(pair(torch.float32, "triton")[1], torch.float32, call, True)


def assert_rows_without_keys(ours, dtype, call, average):
    query, key, value = (t.to(dtype).requires_grad_() for t in inputs(ours))
    call = CALLS[call]()
    ((name, mask),) = call.items()
    if mask.dtype != torch.bool:
        mask = call[name] = mask.to(dtype)
    mask[0] = True if mask.dtype == torch.bool else -torch.inf
    out, weights = ours(query, key, value, average_attn_weights=average, **call)
    empty_out = out[:, 0] if name == "key_padding_mask" else out[0]
    empty_weights = weights[0] if name == "key_padding_mask" else weights[..., 0, :]
    assert torch.equal(empty_out, ours.out_proj.bias.expand_as(empty_out))
    assert torch.equal(empty_weights, torch.zeros_like(empty_weights))
    (out.square().sum() + weights.square().sum()).backward()
    for t in (query, key, value, *ours.parameters()):
        assert t.grad.isfinite().all()
    if name == "key_padding_mask":
        assert not query.grad[:, 0].any() and not key.grad[:, 0].any()


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", ["plain", "padding_bool", "attn_bool", "both_float"])
def test_key_interval_is_the_dense_mask(constructor, need_weights, extra):
    _, ours = pair(**CONSTRUCTORS[constructor])
    tensors = inputs(ours)
    interval = masks.window(NQ, NK, left=3) & masks.padding(torch.tensor([5, 7]))
    call = CALLS[extra]() | {"need_weights": need_weights}
    results = ours(*tensors, mask=interval, **call)
    # the same restriction said with torch's float masks
    closed = (~interval.dense(NK)).repeat_interleave(H, dim=0)
    given = call.get("attn_mask", torch.zeros(NQ, NK, dtype=torch.float64))
    if given.dtype == torch.bool:
        closed, given = closed | given, torch.zeros(NQ, NK, dtype=torch.float64)
    call["attn_mask"] = given + torch.zeros(closed.shape).masked_fill(closed, -torch.inf)
    for mine, expected in zip(results, ours(*tensors, **call), strict=True):
        if expected is not None:
            assert_as_accurate(mine, expected, expected)


def test_causal_hint_and_key_interval():
    _, ours = pair()
    tensors, causal = inputs(ours), CALLS["causal_hint"]()
    window = masks.window(NQ, NK, left=3)
    expected = ours(*tensors, mask=window, attn_mask=causal["attn_mask"])[0]
    out, _ = ours(*tensors, mask=window, need_weights=False, **causal)
    assert_as_accurate(out, expected, expected)


def test_dropout_drops_the_weights_it_returns():
    _, ours = pair(dropout=0.25)
    query, key, value = inputs(ours)
    torch.manual_seed(5)
    out, weights = ours(query, key, value, average_attn_weights=False)
    torch.manual_seed(5)
    same_out, mean = ours(query, key, value)
    kept = weights != 0
    assert 0.6 < kept.double().mean() < 0.9
    v = nn.functional.linear(value, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    v = v.unflatten(-1, (H, E // H)).permute(1, 2, 0, 3)
    expected = ours.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(-2))
    assert_as_accurate(out, expected, expected, "out")
    assert_as_accurate(same_out, expected, expected, "out")
    assert_as_accurate(mean, weights.mean(1), weights.mean(1), "weights")
    ours.eval()
    whole = ours(query, key, value, average_attn_weights=False)[1]
    assert_as_accurate(weights[kept], whole[kept] / 0.75, whole[kept] / 0.75, "kept")
    assert torch.equal(ours(query, key, value)[0], ours(query, key, value)[0])


def test_explain_names_the_backend(capsys):
    _, ours = pair(dropout=0.25)
    ours.explain(*inputs(ours))
    said = capsys.readouterr().out
    assert "MultiheadAttention takes 'torch'" in said and "float64 is not float32" in said
    ours.backend = "triton"
    with pytest.raises(RuntimeError, match="MultiheadAttention: backend 'triton' cannot"):
        ours(*inputs(ours))
