"""Losses by their definitions, and hard negatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from support.numerics import assert_as_accurate
from xattn_kernels import (
    entropy_loss,
    hard_negatives,
    image_text_similarity,
    itc_loss,
    itm_loss,
    lm_loss,
    matching_pairs,
    stage_one_losses,
)

pytestmark = pytest.mark.usefixtures("seed")

B, n, DIM = 5, 3, 8
IDS = torch.tensor([7, 2, 7, 4, 2])


def features(dtype=torch.float64, queries=n):
    shape = (B, queries, DIM) if queries else (B, DIM)
    made = torch.randn(shape, dtype=dtype), torch.randn(B, DIM, dtype=dtype)
    return [t.requires_grad_() for t in made]


def itc_by_definition(image, text, temperature, ids, smoothing):
    """Sums over pairs, one after the other."""
    image = image if image.dim() == 3 else image[:, None]
    unit = lambda t: t / t.square().sum().sqrt()  # noqa: E731
    s = [[max(unit(q) @ unit(t) for q in i) / temperature for t in text] for i in image]
    s = torch.stack([torch.stack(row) for row in s])
    total = 0.0
    for logits in (s, s.T):
        for i, row in enumerate(logits):
            same = [float(j == i or (ids is not None and ids[i] == ids[j])) for j in range(B)]
            own = row.new_tensor(same)
            target = (1 - smoothing) * own / own.sum() + smoothing / B
            total = total - (target * (row - row.exp().sum().log())).sum() / B
    return total / 2


@pytest.mark.parametrize("queries", [0, 1, n])
@pytest.mark.parametrize("ids", [None, IDS], ids=["own", "duplicates"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_itc_by_definition(queries, ids, smoothing, dtype):
    exact, found = features(queries=queries), []
    for kind, f in ((torch.float64, "definition"), (dtype, "definition"), (dtype, "ours")):
        leaves = [t.detach().to(dtype).to(kind).requires_grad_() for t in exact]
        leaves.append(torch.tensor(0.2, dtype=kind, requires_grad=True))
        image, text, temperature = leaves
        if f == "ours":
            options = dict(temperature=temperature, ids=ids, label_smoothing=smoothing)
            loss = itc_loss(image, text, **options)
        else:
            loss = itc_by_definition(image, text, temperature, ids, smoothing)
        found.append([*torch.autograd.grad(loss, leaves), loss.detach().to(kind)])
    for truth, eager, ours in zip(*found, strict=True):
        assert_as_accurate(ours, eager, truth)


def test_itc_gradcheck_and_temperatures():
    image, text = features()
    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    f = lambda *t: itc_loss(t[0], t[1], temperature=t[2], label_smoothing=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(f, (image, text, temperature))
    assert torch.equal(
        itc_loss(image, text, temperature=0.3), itc_loss(image, text, temperature=temperature)
    )
    half = itc_loss(image.half(), text.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert half.dtype == torch.float32 and torch.equal(
            half, itc_loss(image.half(), text.half())
        )


def test_itc_of_no_and_one_pair():
    image, text = features()
    assert itc_loss(image[:0], text[:0]).item() == 0.0
    assert itc_loss(image[:1], text[:1]).item() == 0.0


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("ids", [None, IDS])
def test_hard_negatives_by_loops(ids, shift):
    image, text = features()
    similarity = image_text_similarity(image, text) - shift
    found = hard_negatives(similarity, ids=ids)
    for s, chosen in ((similarity, found.texts), (similarity.T, found.images)):
        for i in range(B):
            others = [j for j in range(B) if i != j and (ids is None or ids[i] != ids[j])]
            assert chosen[i] == max(others, key=lambda j: s[i, j])


def test_hard_negatives_drawn():
    """Never a positive, by softmax of the rest, again from the same generator."""
    similarity = torch.tensor([[0.9, 0.1, 0.3, 0.9], [0.0] * 4, [0.0] * 4, [0.5] * 4])
    ids = torch.tensor([1, 2, 3, 1])
    counted, N = torch.zeros(4), 2000
    generator = torch.Generator().manual_seed(3)
    for _ in range(N):
        found = hard_negatives(
            similarity, ids=ids, sample=True, temperature=0.2, generator=generator
        )
        counted[found.texts[0]] += 1
        assert found.texts[3] not in (0, 3) and found.images[0] not in (0, 3)
    p = torch.tensor([0.1, 0.3]).div(0.2).softmax(0)
    assert counted[0] == counted[3] == 0
    deviations = (counted[1:3] - N * p) / (N * p * (1 - p)).sqrt()
    assert deviations.abs().max() < 4
    again = [
        hard_negatives(torch.rand(20, 20, generator=g), sample=True, generator=g)
        for g in (torch.Generator().manual_seed(5) for _ in range(2))
    ]
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))


@pytest.mark.parametrize("sample", [False, True])
def test_without_any_negative(sample):
    ids = torch.tensor([4, 4, 4])
    negatives = hard_negatives(torch.rand(3, 3), ids=ids, sample=sample)
    assert (torch.stack(negatives) == -1).all()
    pairs = matching_pairs(negatives)
    assert pairs.labels.tolist() == [1] * 3 + [-100] * 6
    assert pairs.images.tolist() == pairs.texts.tolist() == [0, 1, 2] * 3
    one = hard_negatives(torch.rand(1, 1), sample=sample)
    assert one.texts.tolist() == one.images.tolist() == [-1]
    assert hard_negatives(torch.rand(0, 0), sample=sample).texts.shape == (0,)


def test_matching_pairs_and_itm():
    negatives = hard_negatives(torch.tensor([[9.0, 1.0, 2.0], [3.0, 9.0, 1.0], [1.0, 2.0, 9.0]]))
    pairs = matching_pairs(negatives)
    assert pairs.images.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 0]
    assert pairs.texts.tolist() == [0, 1, 2, 2, 0, 1, 0, 1, 2]
    assert pairs.labels.tolist() == [1] * 3 + [0] * 6
    logits = torch.randn(9, n, 2, dtype=torch.float64, requires_grad=True)
    labels = pairs.labels.clone()
    labels[4] = -100
    expected = F.cross_entropy(logits.mean(1)[labels >= 0], labels[labels >= 0])
    assert_as_accurate(itm_loss(logits, labels), expected, expected)
    assert torch.autograd.gradcheck(lambda t: itm_loss(t, labels, label_smoothing=0.1), logits)
    none = itm_loss(logits, torch.full_like(labels, -100))
    assert none.item() == 0.0 and not torch.autograd.grad(none, logits)[0].any()


@pytest.mark.parametrize("n_prefix", [0, 1, 4])
def test_lm_predicts_the_next_token(n_prefix):
    N, V = 6, 11
    logits = torch.randn(2, n_prefix + N, V, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (2, N))
    labels[0, 2] = labels[1, 5] = -7
    total, count = 0.0, 0
    for b in range(2):
        for i in range(0 if n_prefix else 1, N):
            if labels[b, i] != -7:
                row = logits[b, n_prefix + i - 1]
                total, count = total - row.log_softmax(0)[labels[b, i]], count + 1
    loss = lm_loss(logits, labels, n_prefix=n_prefix, ignore_index=-7)
    assert_as_accurate(loss, total / count, total / count)
    f = lambda t: lm_loss(t, labels, n_prefix=n_prefix, ignore_index=-7, label_smoothing=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(f, logits)
    assert lm_loss(logits, torch.full_like(labels, -100), n_prefix=n_prefix).item() == 0.0
    assert lm_loss(logits[:, :n_prefix], labels[:, :0], n_prefix=n_prefix).item() == 0.0


def test_stage_one_is_the_sum_and_reaches_everything():
    image, text = features()
    lm_logits, labels = torch.randn(B, 6, 11, requires_grad=True), torch.randint(11, (B, 6))
    head, asked = torch.randn(2 * DIM, 2, dtype=torch.float64, requires_grad=True), []

    def match(images, texts):
        asked.append((images, texts))
        pairs = torch.cat((image[images], text[texts][:, None].expand(-1, n, -1)), -1)
        return pairs @ head

    found = stage_one_losses(image, text, match, lm_logits, labels, ids=IDS, sample=False)
    pairs = matching_pairs(hard_negatives(image_text_similarity(image, text), ids=IDS))
    assert torch.equal(asked[0][0], pairs.images) and torch.equal(asked[0][1], pairs.texts)
    assert torch.equal(found.itc, itc_loss(image, text, ids=IDS, label_smoothing=0.1))
    assert torch.equal(found.itm, itm_loss(match(*asked[0]), pairs.labels))
    assert torch.equal(found.itg, lm_loss(lm_logits, labels, label_smoothing=0.1))
    assert torch.equal(found.total, found.itc + found.itm + found.itg)
    assert all(g.any() for g in torch.autograd.grad(found.total, (image, text, head, lm_logits)))


def test_compiled():
    image, text = features(torch.float32)
    logits, labels = torch.randn(B, 6, 11), torch.randint(11, (B, 6))

    def f(image, text, logits):
        negatives = matching_pairs(hard_negatives(image_text_similarity(image, text), ids=IDS))
        itm = itm_loss(
            torch.stack((image[negatives.images, 0, 0], text[negatives.texts, 0]), 1),
            negatives.labels,
        )
        entropies = entropy_loss(image.softmax(-1)[..., 0], 0.5, per_row=True)
        return itc_loss(image, text, ids=IDS) + itm + lm_loss(logits, labels) + entropies

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image, text, logits), f(image, text, logits))


I, T = torch.zeros(B, n, DIM), torch.zeros(B, DIM)
WRONG = {
    r"image must be .*\[B, dim\] or \[B, n, dim\], got shape \[8\]": lambda: itc_loss(I[0, 0], T),
    "image must be a floating-point tensor .*, got torch.int64": lambda: itc_loss(I.long(), T),
    r"text must be \[B, dim\], got shape": lambda: itc_loss(I, I),
    "image and text must share their width, got 8 and 7": lambda: itc_loss(I, T[:, 1:]),
    "one text for each image, similarity .* got 5 images and 4": lambda: itc_loss(I, T[1:]),
    "at least one query": lambda: itc_loss(I[:, :0], T),
    "temperature must be a positive number, got 0": lambda: itc_loss(I, T, temperature=0),
    "temperature must be a floating-point tensor of one": lambda: itc_loss(I, T, temperature=T),
    r"label_smoothing must be in \[0, 1\), got 1": lambda: itc_loss(I, T, label_smoothing=1),
    r"ids must be an integer tensor \[B\], got torch.float32": lambda: itc_loss(I, T, ids=T[:, 0]),
    r"ids must be \[B\] = \[5\] on cpu, got \[4\]": lambda: itc_loss(I, T, ids=IDS[1:]),
    "sample must be a bool, got int": lambda: hard_negatives(T @ T.T, sample=1),
    "negatives must be HardNegatives, got tuple": lambda: matching_pairs((IDS, IDS)),
    "match must be a function, got str": lambda: stage_one_losses(I, T, "match", I, IDS),
    r"similarity must be \[B, B\], got shape": lambda: hard_negatives(I),
    r"logits must be \[N, 2\] or \[N, n, 2\], got \[5, 8\]": lambda: itm_loss(T, IDS),
    "labels must be an int64 tensor, got torch.float32": lambda: itm_loss(T[:, :2], T[:, 0]),
    "labels must be from 0 to 1, or ignore_index = -100, got 2": lambda: itm_loss(
        T[:, :2], torch.tensor([0, 1, 2, -100, 1])
    ),
    r"one text for each image, similarity \[B, B\], got 5": lambda: hard_negatives(T[:, :4]),
    r"labels must be \[5, 2\] on cpu, got \[5\]": lambda: lm_loss(I, IDS, n_prefix=1),
    "n_prefix must be from 0 to the 3 positions": lambda: lm_loss(I, IDS, n_prefix=4),
    "n_prefix must be an int, got float": lambda: lm_loss(I, IDS, n_prefix=1.0),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
