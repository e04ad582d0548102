"""QFormer: against its equations, and what each objective lets see."""

from __future__ import annotations

import copy

import pytest
import torch

from support.modes import modes
from support.numerics import assert_as_accurate
from support.qformer_cases import (
    DEPTH,
    DIM,
    IMAGE_LENGTHS,
    LENGTHS,
    NK,
    OBJECTIVES,
    VISUAL,
    Q,
    T,
    assert_same,
    inputs,
    ours,
    qformer,
    twin,
    with_gradients,
)
from xattn_kernels import QFormer, masks
from xattn_kernels.core.call import CrossAttentionResult
from xattn_kernels.modules import qformer as qformer_module

pytestmark = pytest.mark.usefixtures("seed")

each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


@each_objective
@pytest.mark.parametrize("backend", ["eager", "torch", None])
def test_by_its_equations(objective, backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    image, ids = inputs(dtype=torch.float64)
    truth = twin(qformer(dtype=torch.float64), objective, image, ids)
    found = ours(qformer(backend, dtype=torch.float64), objective, image, ids)
    assert_same(found, truth, truth)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_from_the_kernels(mode):
    image, ids = inputs()
    truth = twin(qformer(dtype=torch.float64), "itg", image.double(), ids)
    found = ours(qformer("triton", device=mode.device), "itg", image, ids)
    assert_same(found, ours(qformer("eager"), "itg", image, ids), truth)


@pytest.mark.parametrize("backend", ["eager", None])
def test_every_attention_is_of_the_backend(backend, monkeypatch):
    (image, ids), asked = inputs(), []
    monkeypatch.setattr(
        "xattn_kernels.modules.qformer.run",
        lambda name, backends, call, backend: asked.append(backend) or CrossAttentionResult(call.q),
    )
    qformer(backend)(image, ids, objective="itm")
    assert asked == [backend] * (DEPTH + DEPTH // 2)


def test_with_queries_alone_or_text_alone():
    """As "itc", where neither sees the other, and without the keys of the other."""
    (image, ids), module = inputs(dtype=torch.float64), qformer(dtype=torch.float64)
    both = module(image, ids, objective="itc", text_lengths=LENGTHS)
    alone = torch.cat((module(image), module(None, ids, objective="itm", text_lengths=LENGTHS)), 1)
    assert_as_accurate(alone, both, both)


# what of the result changes with what of the call: rows of queries, of text before and after
CHANGES = {
    ("itc", "image"): (True, False, False),
    ("itc", "text"): (False, True, True),
    ("itc", "last token"): (False, True, True),
    ("itm", "image"): (True, True, True),
    ("itm", "text"): (True, True, True),
    ("itg", "image"): (True, True, True),
    ("itg", "text"): (False, True, True),
    ("itg", "last token"): (False, False, True),
    ("itm", "padding"): (False, False, False),
    ("itg", "padding"): (False, False, False),
}


@pytest.mark.parametrize(("objective", "what"), CHANGES, ids=str)
def test_what_is_seen(objective, what):
    module, (image, ids) = qformer(), inputs()
    run = lambda: module(image, ids, objective=objective, text_lengths=torch.tensor([5, 5]))  # noqa: E731
    first = run()
    if what == "image":
        image[:, 0] += 1.0
    else:
        ids[:, {"text": 0, "last token": 4, "padding": 5}[what]] = 0
    changed = (run() != first).any(-1).any(0)
    parts = changed[:Q], changed[Q : Q + 4], changed[Q + 4 : Q + 5]
    assert tuple(part.any().item() for part in parts) == CHANGES[objective, what]
    assert tuple(part.all().item() for part in parts) == CHANGES[objective, what]


def test_padding_of_the_image_is_not_read():
    module, (image, ids) = qformer(), inputs()
    mask = masks.padding(IMAGE_LENGTHS)
    expected = module(image, ids, objective="itm", image_mask=mask)
    image[1, 3:] = 1e3
    assert torch.equal(module(image, ids, objective="itm", image_mask=mask), expected)


def test_without_image_tokens_only_the_bias_is_left():
    (image, ids), module = inputs(Nk=0, dtype=torch.float64), qformer(dtype=torch.float64)
    found = module(image, ids, objective="itm")
    # a single key whose value is 0 gives the same, whatever its score
    with torch.no_grad():
        for layer in module.encoder["layer"][::2]:
            layer.crossattention.attention["value"].weight.zero_()
            layer.crossattention.attention["value"].bias.zero_()
    expected = module(image.new_ones(2, 1, VISUAL), ids, objective="itm")
    assert_as_accurate(found, expected, expected)


@pytest.mark.parametrize("shape", [dict(B=1), dict(T=1), dict(T=0), dict(Nk=0), dict(B=0)], ids=str)
def test_sizes_at_the_edge(shape):
    module, (image, ids) = qformer(), inputs(**shape)
    for arguments in ((image, ids), (None, ids)):
        out = module(*arguments, objective="itg")
        out.sum().backward()
        rows = ids.shape[1] + (0 if arguments[0] is None else Q)
        assert out.shape == (len(ids), rows, DIM) and out.isfinite().all()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


def test_dropout_is_where_berts_is_and_in_training_only(monkeypatch):
    """Embeddings, then weights and what is added: 1 + depth (1 + 2) + what cross-attention adds."""
    dropped, of_weights = [], []
    plain = torch.nn.functional.dropout
    monkeypatch.setattr(
        "torch.nn.functional.dropout", lambda x, p: dropped.append(p) or plain(x, p)
    )
    attend = qformer_module.run

    def seen(name, backends, call, backend):
        of_weights.append(call.dropout_p)
        return attend(name, backends, call, backend)

    monkeypatch.setattr(qformer_module, "run", seen)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (image, ids), module = inputs(), qformer(dropout=0.1)
    trained = module(image, ids, objective="itm")
    looks = DEPTH // 2
    assert of_weights == [0.1] * (DEPTH + looks)
    assert dropped == [0.1] * (1 + DEPTH + looks + 2 * DEPTH)
    trained.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    calm = module.eval()(image, ids, objective="itm")
    assert set(of_weights[len(of_weights) // 2 :]) == {0.0}
    torch.testing.assert_close(calm, qformer()(image, ids, objective="itm"))
    assert not torch.allclose(trained, calm)


def test_batch_elements_do_not_mix():
    (image, ids), module = inputs(dtype=torch.float64), qformer(dtype=torch.float64)
    both = module(image, ids, objective="itm", text_lengths=LENGTHS)
    for b in (0, 1):
        one = slice(b, b + 1)
        alone = module(image[one], ids[one], objective="itm", text_lengths=LENGTHS[one])
        assert_as_accurate(alone, both[one], both[one])


def test_state_dict_goes_there_and_back():
    module, other, (image, ids) = qformer(), qformer(), inputs()
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    assert torch.equal(other(image, ids, objective="itg"), module(image, ids, objective="itg"))


def test_starts_as_bert_does():
    module = QFormer(dim=96, depth=2, heads=3, vocab_size=50)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name.lower():
            assert (p == 1).all(), name
        else:
            assert 0.018 < p.std() < 0.022, name


def test_autocast():
    # with weights as spread as elsewhere, whether bfloat16 errors grow by layer is chance
    (image, ids), mild, low = inputs(), dict(spread=0.1), dict(autocast=True)
    truth = twin(qformer(**mild, dtype=torch.float64), "itm", image.double(), ids)
    found = ours(qformer(**mild), "itm", image, ids, **low)
    eager = twin(qformer(**mild), "itm", image, ids, **low)
    assert not torch.equal(found["output"], ours(qformer(**mild), "itm", image, ids)["output"])
    for names in (["output"], [name for name in truth if name != "output"]):
        all_of = (torch.cat([t[n].flatten() for n in names]) for t in (found, eager, truth))
        assert_as_accurate(*all_of, names[-1], floors=0.0)


def compiled_and_not(backend, objective, **options) -> tuple[dict, dict]:
    image, ids = inputs()
    module = qformer(backend)
    compiled = torch.compile(module, backend="aot_eager", **options)
    first = ours(module, objective, image, ids)
    module.zero_grad()
    texts = dict(objective=objective, text_lengths=LENGTHS)
    mask = masks.padding(IMAGE_LENGTHS)
    call = lambda x: compiled(x, ids, image_mask=mask, **texts)  # noqa: E731
    return with_gradients(call, module, image), first


@each_objective
def test_compiles_in_one_graph(objective):
    torch.testing.assert_close(*compiled_and_not("eager", objective, fullgraph=True))


def test_compiles_with_the_default(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.testing.assert_close(*compiled_and_not(None, "itg"))


WRONG_OPTIONS = {
    "dim must be at least 1, got 0": dict(dim=0),
    "heads must divide dim = 24, got 5": dict(heads=5),
    "num_queries must be an int, got float": dict(num_queries=32.0),
    "cross_attention_every must be at least 1, got 0": dict(cross_attention_every=0),
    "vocab_size must be at least 1, got 0": dict(vocab_size=0),
    "norm_eps must be a positive number, got 0": dict(norm_eps=0),
    "dropout must be at least 0 and below 1, got 1.0": dict(dropout=1.0),
    "backend must be one of None, 'triton'": dict(backend="flash"),
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options(message):
    with pytest.raises((TypeError, ValueError), match=message):
        qformer(**WRONG_OPTIONS[message])


X, IDS = torch.zeros(2, NK, VISUAL), torch.zeros(2, T, dtype=torch.int64)
ITM = dict(objective="itm")
WRONG_CALLS = {
    "image_features and input_ids must not both be None": (None, None, {}),
    r"image_features must be \[B, Nk, dim_visual\] with dim_visual = 20": (X[..., 1:], None, {}),
    "image_features must have the dtype of the weights": (X.double(), None, {}),
    "image_mask must be None without image_features": (None, IDS, ITM | dict(image_mask=X)),
    "image_mask as a tensor must be bool": (X, None, dict(image_mask=X)),
    r"image_mask must broadcast to \[B, Hq, Nq, Nk\]": (X, None, dict(image_mask=X[..., 0] > 0)),
    "objective must be one of 'itc', 'itm', 'itg', got None": (X, IDS, {}),
    "objective must be one of None, 'itc', 'itm', 'itg', got 'lm'": (X, None, dict(objective="lm")),
    "text_lengths must be None without input_ids": (X, None, dict(text_lengths=LENGTHS)),
    "the batch of input_ids, 1, must be that of image_features, 2": (X, IDS[:1], ITM),
    "input_ids must be an int32 or int64 tensor, got a torch.float32 tensor": (X, X, ITM),
    r"input_ids must be \[B, T\] with T at most 9, got \[2, 12\]": (X, IDS.repeat(1, 2), ITM),
    "input_ids must be from 0 to 12, got 13": (X, IDS + 13, ITM),
    "input_ids must be on the device of the weights, cpu, got meta": (X, IDS.to("meta"), ITM),
    r"text_lengths must be \[B\] = \[2\], got \[1\]": (
        X,
        IDS,
        ITM | dict(text_lengths=LENGTHS[:1]),
    ),
    "text_lengths must be an int32 or int64 tensor": (X, IDS, ITM | dict(text_lengths=[4, 6])),
    "text_lengths must be at most 6, not 7": (X, IDS, ITM | dict(text_lengths=LENGTHS + 1)),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_arguments(message):
    image, ids, options = WRONG_CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        qformer()(image, ids, **options)


def test_text_needs_a_vocabulary():
    with pytest.raises(ValueError, match="input_ids must be None in a module without vocab_size"):
        qformer(vocab_size=None)(X, IDS, objective="itm")
