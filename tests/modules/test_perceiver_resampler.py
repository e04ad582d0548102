"""`PerceiverResampler` beyond the recordings: padded media, corner cases, wrong arguments."""

from __future__ import annotations

import copy

import pytest
import torch

from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import PerceiverResampler

pytestmark = pytest.mark.usefixtures("seed")

B, T, n, DIM = 2, 3, 7, 24
SIZES = dict(dim=DIM, depth=2, dim_head=8, heads=2, num_latents=5)
LENGTHS = torch.tensor([[7, 3, 1], [0, 7, 6]])


def run(module, x, *lengths):
    """Output and every gradient, by name."""
    x = x.detach().to(module.latents).requires_grad_()
    out = module(x, *lengths)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    leaves = {"x": x} | dict(module.named_parameters())
    grads = torch.autograd.grad((out * weight.view_as(out)).sum(), list(leaves.values()))
    return {"out": out} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def one_by_one(module, x, lengths):
    """Each media alone, without what pads it."""
    place = module.media_time_embs
    media = x if place is None else x + place[: x.shape[1]]
    bare = copy.copy(module)
    bare._parameters = module._parameters | {"media_time_embs": None}
    rows = [[bare(m[:, :k])[0, 0] for m, k in zip(row, ks, strict=True)]
            for row, ks in zip(media[:, :, None], lengths.tolist(), strict=True)]  # fmt: skip
    return torch.stack([torch.stack(row) for row in rows])


def assert_padding_is_not_read(dtype, backend, device="cpu"):
    exact = PerceiverResampler(**SIZES, max_num_media=T, backend="eager", dtype=torch.float64)
    x, lengths = torch.randn(B, T, n, DIM, device=device), LENGTHS.to(device)
    exact.to(device)

    def alone(module):
        def f(x, _):
            return one_by_one(module, x, LENGTHS)

        f.latents, f.named_parameters = module.latents, module.named_parameters
        return f

    eager = copy.deepcopy(exact).to(dtype)
    module = copy.deepcopy(eager)
    for layer in module.layers:
        layer[0].backend = backend
    truth, standard = run(alone(exact), x, lengths), run(alone(eager), x, lengths)
    for name, value in run(module, x, lengths).items():
        assert_as_accurate(value, standard[name], truth[name], name)
    padding = torch.arange(n, device=device) >= lengths[..., None]
    found = run(module, x.masked_fill(padding[..., None], 1e3), lengths)
    assert torch.equal(found["out"], module(x.to(dtype), lengths))
    assert not found["dx"][padding].any()


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_is_not_read(backend, dtype):
    assert_padding_is_not_read(dtype, backend)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_padding_is_not_read_by_the_kernels(mode):
    assert_padding_is_not_read(torch.float32, "triton", mode.device)


def test_ranks_and_empty_media():
    module = PerceiverResampler(**SIZES, dtype=torch.float64)
    x = torch.randn(B, n, DIM, dtype=torch.float64)
    out = module(x)
    assert out.shape == (B, 1, 5, DIM)
    assert torch.equal(out, module(x[:, None])) and torch.equal(out, module(x[:, None, None]))
    lengths = torch.tensor([3, 5])
    assert torch.equal(module(x, lengths), module(x, lengths[:, None]))
    assert module(x[:, None][:, :0]).shape == (B, 0, 5, DIM)
    # sums of other lengths, which a BLAS may round otherwise
    empty = module(x, torch.zeros(B, dtype=torch.int32))
    torch.testing.assert_close(module(x[:, :0]), empty)


def test_autocast_and_copies():
    module = PerceiverResampler(**SIZES, num_media_embeds=4)
    x = torch.randn(B, T, n, DIM)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = copy.deepcopy(module)(x)
    assert out.dtype == torch.float32 and 0 < (out - expected).abs().max() < 0.1
    other = PerceiverResampler(**SIZES, num_media_embeds=4)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x), expected)


WRONG = {
    "x must be .* with dim = 24, got \\[2, 7, 5\\]": ({}, torch.zeros(B, n, 5)),
    "x must be .* with dim = 24, got \\[7, 24\\]": ({}, torch.zeros(n, DIM)),
    "x must be a floating-point tensor, got a torch.int64": ({}, torch.zeros(B, n, DIM).long()),
    "x has 3 media, more than the 2 with": (dict(num_media_embeds=2), torch.zeros(B, T, n, DIM)),
    "x has 3 media, more than the 1 with": (dict(max_num_media=1), torch.zeros(B, T, n, DIM)),
    "x has 4 frames, more than the 2": (dict(max_num_frames=2), torch.zeros(B, T, 4, n, DIM)),
    "max_num_frames needs x": (dict(max_num_frames=2), torch.zeros(B, T, n, DIM)),
    "key_lengths must be an integer tensor .* = \\[2, 3\\], got \\[2\\]": (
        {}, torch.zeros(B, T, n, DIM), torch.ones(B).long(),
    ),
    "got list": ({}, torch.zeros(B, T, n, DIM), [1, 2]),
    "key_lengths must be an integer tensor, got list": ({}, torch.zeros(B, n, DIM), [7, 7]),
    "x must have the dtype of the weights": ({}, torch.zeros(B, n, DIM).double()),
    "key_lengths must be an int32 or int64": ({}, torch.zeros(B, n, DIM), torch.ones(B)),
    "key_lengths must be at most 7, not 8": ({}, torch.zeros(B, n, DIM), torch.tensor([8, 1])),
    "key_lengths must be at least 0, not -1": ({}, torch.zeros(B, n, DIM), torch.tensor([-1, 1])),
    "name one embedding": (dict(num_media_embeds=2, max_num_media=2), None),
    "max_num_frames must be at least 1, got 0": (dict(max_num_frames=0), None),
    "depth must be at least 1, got 0": (dict(depth=0), None),
    "backend must be one of": (dict(backend="flash"), None),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    options, *call = WRONG[message]
    with pytest.raises((TypeError, ValueError), match=message):
        PerceiverResampler(**SIZES | options)(*call)
