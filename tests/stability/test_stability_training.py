"""Several data sets in one step, BLIP-2's stages, and whether vision is ignored."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support.numerics import assert_as_accurate
from xattn_kernels import (
    DatasetMixture,
    alignment_stage,
    blind_baseline,
    freeze,
    generation_stage,
)

LOADERS = {"pairs": [1.0, 2.0, 3.0], "video": [10.0, 20.0]}
WEIGHTS = {"pairs": 1.0, "video": 0.25}


def test_each_data_set_goes_round_on_its_own():
    mixture = DatasetMixture(LOADERS, WEIGHTS)
    first = list(islice(mixture, 4))
    assert [b["pairs"] for b in first] == [1, 2, 3, 1] and [b["video"] for b in first] == [
        10, 20, 10, 20,
    ]  # fmt: skip
    assert next(iter(mixture)) == {"pairs": 2, "video": 10}  # where it was left
    with pytest.raises(ValueError, match=r"loaders\['pairs'\] must have a batch"):
        next(iter(DatasetMixture({"pairs": []}, {"pairs": 1})))
    with pytest.raises(ValueError, match="iterable again"):
        list(islice(DatasetMixture({"pairs": iter([1.0])}, {"pairs": 1}), 2))


def loss_of(parameter, live=None):
    def loss(name, batch):
        if live is not None:
            live.append(name)
        return (parameter * batch).square().sum() / (1 if name == "pairs" else 3)

    return loss


def test_gradients_are_the_weighted_sum():
    p = nn.Parameter(torch.randn(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)  # adds up, as backward does
    mixture = DatasetMixture(LOADERS, WEIGHTS)
    batches = next(iter(mixture))
    losses = mixture.backward(batches, loss_of(p))
    whole = [WEIGHTS[n] * loss_of(p)(n, batches[n]) for n in WEIGHTS]
    (truth,) = torch.autograd.grad(sum(whole), p)
    assert_as_accurate(p.grad, truth + 1, truth + 1)
    for name, loss in losses.items():
        assert not loss.requires_grad and torch.equal(loss, loss_of(p)(name, batches[name]))


def test_one_graph_at_a_time_one_exchange_and_a_scaler():
    order, p = [], nn.Parameter(torch.ones(2))
    p.register_hook(lambda grad: order.append("backward") or grad)
    mixture = DatasetMixture(LOADERS, WEIGHTS)

    class Parallel(nn.Module):
        @contextmanager
        def no_sync(self):
            order.append("alone")
            yield
            order.append("done")

    scaler = SimpleNamespace(scale=lambda loss: 8 * loss)
    batches = next(iter(mixture))
    mixture.backward(batches, loss_of(p, order), model=Parallel(), scaler=scaler)
    assert order == ["alone", "pairs", "backward", "done", "video", "backward"]
    plain = nn.Parameter(torch.ones(2))
    mixture.backward(batches, loss_of(plain))
    torch.testing.assert_close(p.grad, 8 * plain.grad)


def parts():
    names = ("vision_encoder", "qformer", "projection", "language_model")
    return {n: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)) for n in names}


def trains(modules) -> dict[str, tuple[bool, bool]]:
    """{name: (requires grad, training mode)}."""
    return {n: (m[0].weight.requires_grad, m[1].training) for n, m in modules.items()}


def test_the_two_stages():
    made = parts()
    first = alignment_stage(vision_encoder=made["vision_encoder"], qformer=made["qformer"])
    nn.Module.train(made["vision_encoder"])
    first.train()
    found = trains(made)
    assert found["vision_encoder"] == (False, False) and found["qformer"] == (True, True)
    assert list(first.trainable) == ["qformer.0.weight", "qformer.0.bias"]
    first.undo()
    assert all(required for required, _ in trains(made).values())
    for train_qformer in (False, True):
        second = generation_stage(**made, train_qformer=train_qformer)
        second.train()
        learns = {"projection"} | ({"qformer"} if train_qformer else set())
        assert trains(made) == {n: (n in learns, n in learns) for n in made}
        assert {n.split(".")[0] for n in second.trainable} == learns
        second.undo()
        assert all(required for required, _ in trains(made).values())


def test_a_stage_wakes_what_an_earlier_one_froze():
    made = parts()
    freeze(made["qformer"])
    stage = alignment_stage(vision_encoder=made["vision_encoder"], qformer=made["qformer"])
    stage.train()
    assert trains(made)["qformer"] == (True, True)
    stage.undo()
    assert not trains(made)["qformer"][0]


class Captioner(nn.Module):
    """Its loss depends on the images by `sight`; more so with dropout, which is off."""

    def __init__(self, sight):
        super().__init__()
        self.sight, self.dropout, self.frozen = sight, nn.Dropout(0.9), nn.Dropout(0.9)

    def forward(self, images, text):
        right = (images.flatten(1).mean(1) - text).square().mean()
        return SimpleNamespace(loss=self.dropout(2.0 + self.sight * right))


def batch():
    text = torch.tensor([3.0, -1.0])
    return dict(images=text[:, None, None].expand(2, 4, 4).clone(), text=text)


@pytest.mark.parametrize("sight", [0.0, 1.0])
def test_blind_baseline(sight):
    model = Captioner(sight).train()
    model.frozen.eval()
    found = blind_baseline(model, batch())
    assert found == (2.0, 2.0 + 5 * sight, 5 * sight, sight == 0.0)
    assert model.training and model.dropout.training and not model.frozen.training
    model.eval()
    other = blind_baseline(model, batch(), blank="other", vision="images")
    assert other.gap == 16 * sight
    mean = blind_baseline(model, batch(), blank=lambda t: t.mean() + 0 * t, threshold=4.5)
    assert mean.gap == 4 * sight and mean.ignored
    assert blind_baseline(lambda **b: {"loss": model(**b).loss}, batch()).loss == pytest.approx(2.0)


def test_a_model_that_fails_has_its_modes_back():
    model = Captioner(1.0).train()
    with pytest.raises(TypeError):
        blind_baseline(model, batch() | {"unknown": 1})
    assert model.training and model.dropout.training


M, B = nn.Linear(2, 2), batch()
WRONG = {
    r"weights must have the names of loaders, \['pairs', 'video'\]": lambda: DatasetMixture(
        LOADERS, {"pairs": 1}
    ),
    "loaders must be a mapping of iterables by name, got list": lambda: DatasetMixture([B], {}),
    "weights must be a mapping of numbers by name, got list": lambda: DatasetMixture(LOADERS, [1]),
    r"loaders\['x'\] must be an iterable, got int": lambda: DatasetMixture({"x": 1}, {"x": 1.0}),
    r"weights\['video'\] must be a positive number, got 0": lambda: DatasetMixture(
        LOADERS, WEIGHTS | {"video": 0}
    ),
    r"batches must be of \['pairs', 'video'\], got those of": lambda: DatasetMixture(
        LOADERS, WEIGHTS
    ).backward({"pairs": 1}, loss_of(M.weight)),
    r"loss_of\('pairs', ...\) must be a tensor of one value": lambda: DatasetMixture(
        LOADERS, WEIGHTS
    ).backward({"pairs": 1, "video": 1}, lambda *_: 3.0),
    "qformer must be an nn.Module, got str": lambda: alignment_stage(vision_encoder=M, qformer="q"),
    "train_qformer must be a bool, got int": lambda: generation_stage(**parts(), train_qformer=1),
    "vision must name tensors of the batch, .*, got none known": lambda: blind_baseline(
        M, {"x": B["text"]}
    ),
    "model must be a function, got str": lambda: blind_baseline("model", B),
    "batch must be a mapping of arguments by name, got list": lambda: blind_baseline(M, [B]),
    r"vision\[0\] must be a name, got int": lambda: blind_baseline(M, B, vision=[1]),
    r"got \['pixels'\]": lambda: blind_baseline(M, B, vision="pixels"),
    "blank must be a number": lambda: blind_baseline(Captioner(0), B, blank="none"),
    "threshold must be at least 0": lambda: blind_baseline(Captioner(0), B, threshold=-1),
    "blank='other' needs a batch of at least 2": lambda: blind_baseline(
        Captioner(0), {"images": B["images"][:1]}, blank="other"
    ),
    "model must give a loss of one value": lambda: blind_baseline(lambda **b: b["images"], B),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
