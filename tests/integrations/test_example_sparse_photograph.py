"""`examples/sparse_photograph.py`: what it prints, and that its checks notice what they should."""

from __future__ import annotations

import re

import pytest
import torch

from support import example_programs
from xattn_kernels import cross_attention, kept_mass, topk_attention

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def photo(example):
    return example.load()


@pytest.mark.slow
def test_more_keys_are_nearer_to_dense(example, tmp_path):
    log = example_programs.run(
        "sparse_photograph", "--every", "64", "--repeats", "1", "--out", str(tmp_path / "new"),
        folder=tmp_path,
    )  # fmt: skip
    assert (
        "all keys are dense attention, the chosen have the highest scores, the bound holds" in log
    )
    row = re.compile(r"^  (keys|blocks) +(\d+) +[\d.]+% +([\d.]+)% +([\d.]+)%", re.M)
    sharp, soft = log.split("soft, temperature")
    for text in (sharp, soft):
        found = [(kind, *map(float, numbers)) for kind, *numbers in row.findall(text)]
        keys = [found_row for found_row in found if found_row[0] == "keys"]
        assert [n for _, n, _, _ in keys] == list(example.TOP_K)
        kept, errors = ([r[i] for r in keys] for i in (2, 3))
        assert kept == sorted(kept) and errors == sorted(errors, reverse=True)
        # of as many keys the best have more of the attention than whole blocks
        of_blocks = {n: kept for kind, n, kept, _ in found if kind == "blocks"}
        assert all(of_blocks[n] < kept for _, n, kept, _ in keys if n in of_blocks)
    for name in ("sparse_photograph.png", "sparse_photograph_words.png"):
        example_programs.assert_picture(tmp_path / "new" / name)


def test_blocks_are_neighbours_in_the_photograph(example, photo):
    place = torch.arange(example.GRID[0] * example.GRID[1])
    ordered = example.by_block(place[:, None])[:, 0]
    rows, columns = ordered.div(example.GRID[1], rounding_mode="floor"), ordered % example.GRID[1]
    for axis in (rows, columns):
        of_block = axis.view(-1, example.TILE**2)
        assert (of_block.amax(1) - of_block.amin(1) == example.TILE - 1).all()
    assert torch.equal(example.in_reading_order(ordered[None]).flatten(), place)
    # a key's colour is that of its patch
    colours = example.in_reading_order(photo.v[0, 0].T)
    patch = photo.pixels[40:44, 100:104].mean((0, 1))
    torch.testing.assert_close(colours[:, 10, 25], patch)


@pytest.fixture(scope="module")
def call(photo):
    """(q, k, v), few of each."""
    return photo.k[:, :, ::997], photo.k[:, :, ::16], photo.v[:, :, ::16]


def test_an_output_farther_from_dense_than_its_mass_allows_is_noticed(example, call):
    q, k, v = call
    dense, out = cross_attention(q, k, v, scale=9.0), topk_attention(q, k, v, 8, scale=9.0)
    kept = kept_mass(q, k, 8, scale=9.0)
    example.check_bound(out, dense, kept, v)
    with pytest.raises(AssertionError, match="farther from dense than its mass allows"):
        example.check_bound(out, dense, torch.ones_like(kept), v)


def test_a_worse_key_among_the_chosen_is_noticed(example, call):
    q, k, v = call
    indices = topk_attention(q, k, v, 8, return_indices=True).indices
    example.check_choice(indices, q, k)
    worse = indices.clone()
    worse[..., 0] = (q @ k.mT).argmin(-1)
    for wrong in (worse, torch.cat((indices[..., :-1], indices[..., :1]), -1)):
        with pytest.raises(AssertionError, match="not those of the highest scores"):
            example.check_choice(wrong, q, k)


def test_all_keys_that_are_not_all_are_noticed(example, photo, call, monkeypatch):
    q, k, v = call
    few = photo._replace(k=k, v=v)
    example.check_all_keys(q, few, 9.0)
    monkeypatch.setattr(
        example, "topk_attention", lambda q, k, v, n, **o: topk_attention(q, k, v, n // 2, **o)
    )
    with pytest.raises(AssertionError, match="with all keys out and dq differ"):
        example.check_all_keys(q, few, 9.0)
