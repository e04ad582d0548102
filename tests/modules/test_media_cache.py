"""`MediaCache`: the same results as without, and no way to use one of other weights unnoticed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from support.flamingo import (
    FLAVOURS,
    VISUAL,
    N,
    block,
    call,
    run,
)
from support.numerics import assert_as_accurate

pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cached_media_give_the_same(flavour):
    module, (x, media, locations) = block(flavour), call()
    expected = run(module, module, x, media, locations)
    cached = run(lambda x, media, m: module(x, module.cache_media(media), m), module, x, media,
                 locations)  # fmt: skip
    for name, t in expected.items():
        assert torch.equal(cached[name], t), name


@pytest.mark.parametrize("flavour", ["flamingo", "flamingo_all", "llama_hugging_face"])
def test_decoding_with_a_cache_is_the_whole_text_at_once(flavour):
    module, (x, media, locations) = block(flavour), call()
    whole = module(x, media, locations)
    cache, last = module.cache_media(media), 7
    for i in range(last, N):
        step = module(x[:, i : i + 1], cache, locations[:, : i + 1], use_cached_media=True)
        assert_as_accurate(step, whole[:, i : i + 1], whole[:, i : i + 1])
    swapped = cache.select(torch.tensor([1, 0]))
    other = module(x[:, last:].flip(0), swapped, locations.flip(0), use_cached_media=True)
    assert_as_accurate(other.flip(0), whole[:, last:], whole[:, last:])


def fused_step(module, c):
    module(c.x, c.cache, c.locations).sum().backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
    optimizer.step()
    optimizer.zero_grad()


STALE = {
    "written": lambda m, c: torch.nn.init.ones_(m.attn.to_kv.weight),
    "k_norm_written": lambda m, c: torch.nn.init.ones_(m.attn.k_norm.weight),
    "loaded": lambda m, c: m.load_state_dict(m.state_dict()),
    "stepped": fused_step,
    "frozen": lambda m, c: m.requires_grad_(False),
    "replaced": lambda m, c: setattr(m.attn, "to_kv", torch.nn.Linear(VISUAL, 32, bias=False)),
    "narrowed": lambda m, c: m.float(),
}


@pytest.mark.parametrize("change", STALE)
def test_a_stale_cache_is_refused(change):
    module, (x, media, locations) = block("llama_meta"), call()
    c = SimpleNamespace(x=x, cache=module.cache_media(media), locations=locations)
    module(x, c.cache, locations)
    STALE[change](module, c)
    x = x.to(module.attn_gate.dtype)
    with pytest.raises(ValueError, match="cache"):
        module(x, c.cache, locations)
    hooks = module.attn.k_norm.weight._post_accumulate_grad_hooks
    del c
    assert not hooks, "a cache that is gone leaves its watch behind"


def test_a_cache_of_others_is_refused():
    module, (x, media, locations) = block(), call()
    cache = module.cache_media(media)
    for other in (copy.deepcopy(module), block()):
        with pytest.raises(ValueError, match="other weights"):
            other(x, cache, locations)
    with torch.inference_mode():
        assert module(x, module.cache_media(media), locations).shape == x.shape
        unwatched = block()
        with pytest.raises(ValueError, match="inference_mode"):
            unwatched.cache_media(media)
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        cache = module.cache_media(media.float())
    with pytest.raises(ValueError, match="same autocast"):
        module(x.float(), cache, locations)
