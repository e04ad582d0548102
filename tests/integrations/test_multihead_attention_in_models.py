"""`MultiheadAttention` in place of torch's: swapping, errors, torch's layers, memory."""

import copy
import pickle

import pytest
import torch
from torch import nn

from support.largest_tensor import LargestTensor
from support.numerics import assert_as_accurate
from xattn_kernels import masks
from xattn_kernels.modules import MultiheadAttention, replace_multihead_attention

pytestmark = pytest.mark.usefixtures("seed")

B, H, NQ, NK, E = 2, 4, 5, 7, 32


def test_from_torch_shares_parameters():
    theirs = nn.MultiheadAttention(E, H, kdim=12, add_bias_kv=True, dtype=torch.float64).eval()
    calls = []
    theirs.register_forward_hook(lambda *_: calls.append(1))
    ours = MultiheadAttention.from_torch(theirs, backend="torch")
    assert type(ours) is MultiheadAttention and ours.backend == "torch" and not ours.training
    for (name, p), (expected, q) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == expected and p is q
    tensors = [torch.randn(n, B, w, dtype=torch.float64) for n, w in ((NQ, E), (NK, 12), (NK, E))]
    expected = theirs(*tensors)[0]
    assert_as_accurate(ours(*tensors)[0], expected, expected)
    assert len(calls) == 2
    ours.register_buffer("extra", torch.zeros(1))
    assert not hasattr(theirs, "extra")


def test_from_torch_refuses_subclasses_and_strangers():
    class Changed(nn.MultiheadAttention):
        pass

    for module in (Changed(E, H), nn.Linear(2, 2), MultiheadAttention(E, H)):
        with pytest.raises(TypeError, match=f"got {type(module).__name__}"):
            MultiheadAttention.from_torch(module)


def test_replace_swaps_every_instance_and_nothing_else():
    class Changed(nn.MultiheadAttention):
        pass

    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict(
        {"a": shared, "b": nn.ModuleList([shared, Changed(E, H)]), "c": nn.Transformer(E, H, 1, 1)}
    )
    state, parameters = model.state_dict(), list(model.parameters())
    assert replace_multihead_attention(model, backend="torch") == 1 + 3
    assert type(shared) is MultiheadAttention and model["b"][0] is shared is model["a"]
    assert shared.backend == "torch" and type(model["b"][1]) is Changed
    assert not any(type(m) is nn.MultiheadAttention for m in model.modules())
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(state, strict=True)
    assert replace_multihead_attention(model) == 0
    root = nn.MultiheadAttention(E, H)
    assert replace_multihead_attention(root) == 1 and type(root) is MultiheadAttention
    for twin in (copy.deepcopy(root), pickle.loads(pickle.dumps(root))):
        assert type(twin) is MultiheadAttention
        assert torch.equal(twin.in_proj_weight, root.in_proj_weight)


def test_hooks_survive_the_swap_and_can_be_removed():
    module, calls = nn.MultiheadAttention(E, H), []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    replace_multihead_attention(module)
    module(*[torch.randn(NQ, B, E)] * 3)
    handle.remove()
    module(*[torch.randn(NQ, B, E)] * 3)
    assert calls == [1]


def layer_calls():
    causal = nn.Transformer.generate_square_subsequent_mask(NQ, dtype=torch.float64)
    padding = torch.arange(NQ) >= torch.tensor([[3], [NQ]])
    memory_padding = torch.arange(NK) >= torch.tensor([[NK], [4]])
    return {
        "plain": {},
        "padding": {"src_key_padding_mask": padding, "tgt_key_padding_mask": padding,
                    "memory_key_padding_mask": memory_padding},
        "causal": {"mask": causal, "tgt_mask": causal, "tgt_is_causal": True, "is_causal": True},
    }  # fmt: skip


@pytest.mark.parametrize("call", ["plain", "padding", "causal"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_torch_transformers_work_after_the_swap(kind, train, batch_first, call):
    options = {"batch_first": batch_first, "dropout": 0.0, "dtype": torch.float64}
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(E, H, 48, **options)
        theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    else:
        theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 48, **options), 2)
    lengths = (NQ,) if kind == "encoder" else (NQ, NK)
    shapes = [(B, n, E) if batch_first else (n, B, E) for n in lengths]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    known = type(theirs).forward.__code__.co_varnames
    call = {name: value for name, value in layer_calls()[call].items() if name in known}
    theirs.train(train)
    ours = copy.deepcopy(theirs)
    assert replace_multihead_attention(ours) == (2 if kind == "encoder" else 4)
    if not train:
        with torch.no_grad():
            expected = theirs(*tensors, **call)
            assert_as_accurate(ours(*tensors, **call), expected, expected, "out")
            return
    grad = torch.randn_like(tensors[0])
    (expected := theirs(*tensors, **call)).backward(grad)
    (out := ours(*tensors, **call)).backward(grad)
    assert_as_accurate(out, expected, expected, "out")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_as_accurate(p.grad, q.grad, q.grad, name)


@pytest.mark.parametrize("mask_dim", [2, 3])
@pytest.mark.parametrize("padding", [True, False])
def test_encoder_layer_inference_path_gets_its_masks(mask_dim, padding):
    theirs = nn.TransformerEncoderLayer(E, H, 48, batch_first=True).double().eval()
    ours = copy.deepcopy(theirs)
    replace_multihead_attention(ours)
    x = torch.randn(B, NQ, E, dtype=torch.float64)
    mask = torch.randn(NQ, NQ) > 1 if mask_dim == 2 else torch.randn(B * H, NQ, NQ) > 1
    mask[..., 0] = False
    call = {"src_mask": mask}
    if padding:
        call["src_key_padding_mask"] = torch.arange(NQ) >= torch.tensor([[3], [NQ]])
    with torch.no_grad():
        expected = theirs(x, **call)
        assert_as_accurate(ours(x, **call), expected, expected)


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


CONSTRUCTOR_ERRORS = [
    {"embed_dim": 0, "num_heads": 4},
    {"embed_dim": 32, "num_heads": -1},
    {"embed_dim": 32, "num_heads": 5},
]
CALL_ERRORS = {
    "rank of query": {"query": t(E)},
    "rank of key": {"key": t(NK, E)},
    "rank of value": {"query": t(NQ, E), "key": t(NK, E)},
    "width of query": {"query": t(NQ, B, E + 1)},
    "width of key": {"key": t(NK, B, 12), "value": t(NK, B, 12)},
    "width of value": {"value": t(NK, B, 12)},
    "length of value": {"value": t(NK + 1, B, E)},
    "batch of key": {"key": t(NK, B + 1, E), "value": t(NK, B + 1, E)},
    "dtype of query": {"query": t(NQ, B, E, dtype=torch.float64)},
    "rank of padding": {"key_padding_mask": t(NK).bool()},
    "shape of padding": {"key_padding_mask": t(B, NK + 1).bool()},
    "batch of padding": {"key_padding_mask": t(B + 1, NK).bool()},
    "dtype of padding": {"key_padding_mask": t(B, NK).int()},
    "rank of attn_mask": {"attn_mask": t(1, 1, NQ, NK)},
    "shape of attn_mask": {"attn_mask": t(NQ + 1, NK)},
    "heads of attn_mask": {"attn_mask": t(B, NQ, NK)},
    "dtype of attn_mask": {"attn_mask": t(NQ, NK).int()},
    "unbatched attn_mask": {"query": t(NQ, E), "key": t(NK, E), "value": t(NK, E),
                                "attn_mask": t(B, NQ, NK)},
    "unbatched padding": {"query": t(NQ, E), "key": t(NK, E), "value": t(NK, E),
                              "key_padding_mask": t(B, NK).bool()},
    "hint without mask": {"is_causal": True},
}  # fmt: skip


@pytest.mark.parametrize("options", CONSTRUCTOR_ERRORS)
def test_constructor_raises_what_torch_raises(options):
    with pytest.raises((ValueError, AssertionError)) as theirs:
        nn.MultiheadAttention(**options)
    with pytest.raises(theirs.type, match=f"{options['num_heads']}"):
        MultiheadAttention(**options)


@pytest.mark.parametrize("widths", [{}, {"kdim": 16, "vdim": 16}])
@pytest.mark.parametrize("case", CALL_ERRORS)
def test_call_raises_what_torch_raises(case, widths):
    if widths and "width" not in case:
        pytest.skip("the widths do not matter")
    call = {"query": t(NQ, B, E), "key": t(NK, B, E), "value": t(NK, B, E)} | CALL_ERRORS[case]
    with pytest.raises((AssertionError, RuntimeError)) as theirs:
        nn.MultiheadAttention(E, H, **widths)(**call)
    word = case.split()[-1] if " of " in case else "mask"
    with pytest.raises(theirs.type, match=word if "dtype of query" != case else "dtype"):
        MultiheadAttention(E, H, **widths)(**call)


def test_own_errors():
    tensors = t(NQ, B, E), t(NK, B, E), t(NK, B, E)
    with pytest.raises(TypeError, match="mask must be a KeyInterval or None, got Tensor"):
        MultiheadAttention(E, H)(*tensors, mask=t(NQ, NK).bool())
    with pytest.raises(ValueError, match="does not broadcast"):
        MultiheadAttention(E, H)(*tensors, mask=masks.causal(NQ + 1, NK))
    with pytest.raises(ValueError, match="dropout_p"):
        MultiheadAttention(E, H, dropout=1.0)(*tensors)


@pytest.mark.parametrize("given", ["nothing", "padding", "attn_mask", "both", "interval"])
def test_weights_never_exist_per_head(given):
    heads, n = 8, 96
    module = MultiheadAttention(E, heads, backend="torch")
    x = torch.randn(n, B, E, requires_grad=True)
    call = {}
    if given in ("padding", "both"):
        call["key_padding_mask"] = torch.rand(B, n) < 0.3
    if given in ("attn_mask", "both"):
        call["attn_mask"] = torch.rand(n, n) < 0.3
    if given == "interval":
        call["mask"] = masks.window(n, n, left=9)
    with LargestTensor() as largest:
        out, weights = module(x, x, x, **call)
        (out.square().sum() + weights.square().sum()).backward()
    scores = weights.element_size() * B * heads * n * n
    assert scores // heads <= largest.nbytes < scores // 2
    with LargestTensor() as largest:
        nn.MultiheadAttention(E, heads)(x, x, x)
    assert largest.nbytes == scores


def test_explain_says_that_a_backend_cannot(capsys):
    ours = MultiheadAttention(8, 2, backend="triton", dtype=torch.float64)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    ours.explain(x, x, x)
    printed = capsys.readouterr().out
    assert "MultiheadAttention cannot run with backend='triton'" in printed
    assert "float64 is not" in printed
