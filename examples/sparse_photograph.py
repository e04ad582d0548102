"""Dense and sparse attention over the 16,640 patches of one photograph: the loss with few keys.

The photograph is scikit-learn's china.jpg. Its tokens are windows of 8 x 8 pixels, 4 pixels apart;
keys are their largest 32 principal components at unit length, values their colours, so that
attention answers "what colour has the photograph where it looks like this?". Queries are the
patches of one block in 16, and four words, each the mean key of a small box that shows it.

The program compares `topk_attention` with `cross_attention` at a sharp and at a soft temperature,
with 8 to 4,096 keys a query and with blocks of 64 keys that 64 queries share. It measures the error
of the output and of its gradient, the kept mass, and the ratio of times, all in one run.
Neighbours in the photograph are neighbours in memory (8 x 8 patches are a block), as the keys of a
block must resemble each other. It checks, and raises an AssertionError where one does not hold:

    all keys           give the dense output and gradient, to rounding
    the chosen keys    have the highest scores
    |out - dense|      is at most 2 (1 - kept mass) max |v|: the weights of the chosen keys, m in
                       all, are divided by m, which moves out by (1 - m) max |v|, and those of the
                       other keys are missing, which moves it by as much again

It writes two pictures: the error over the share of keys, and where the words look in both.

    python examples/sparse_photograph.py --out plots

Needs scikit-learn, Pillow and matplotlib: pip install 'xattn-kernels[bench]'.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels import (
    attention_map,
    cross_attention,
    kept_mass,
    topk_attention,
)

try:
    from sklearn.datasets import load_sample_image

    from xattn_kernels import viz
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install 'xattn-kernels[bench]'")

GRID, STRIDE, TILE = (104, 160), 4, 8  # patches, pixels from one to the next, patches of a block
TOP_K = (8, 16, 32, 64, 128, 256, 1024, 4096)
N_BLOCKS = (1, 2, 4, 8, 16, 64)
TEMPERATURES = {"sharp": 0.005, "soft": 0.05}
# (top, left, height, width) in patches
WORDS = {
    "sky": (8, 110, 10, 20),
    "roof": (37, 33, 3, 20),
    "leaves": (92, 20, 8, 40),
    "lake": (64, 112, 5, 16),
}


# Tokens


class Photograph(NamedTuple):
    """A photograph: pixels [height, width, 3] from 0 to 1, and block after block k [1, 1, Nk, 32]
    of unit length and v [1, 1, Nk, 3]."""

    pixels: Tensor
    k: Tensor
    v: Tensor


def load() -> Photograph:
    height, width = (STRIDE * n for n in GRID)
    pixels = torch.tensor(load_sample_image("china.jpg"))[:height, :width] / 255
    planes = pixels.permute(2, 0, 1)[None]
    padded = F.pad(planes, (2, 2, 2, 2), mode="replicate")
    windows = F.unfold(padded, 8, stride=STRIDE)[0].T  # [Nk, 3 * 8 * 8]
    centred = windows - windows.mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -32:]
    keys = F.normalize(centred @ components, dim=-1)
    colours = F.avg_pool2d(planes, STRIDE)[0].flatten(1).T
    return Photograph(pixels, by_block(keys)[None, None], by_block(colours)[None, None])


def by_block(rows: Tensor) -> Tensor:
    """The rows [Nk, n] in reading order, rearranged so that TILE x TILE neighbours are adjacent."""
    h, w = (n // TILE for n in GRID)
    return rows.unflatten(0, (h, TILE, w, TILE)).transpose(1, 2).flatten(0, 3)


def in_reading_order(rows: Tensor) -> Tensor:
    """The rows [R, Nk] of blocks, rearranged to [R, *GRID]."""
    h, w = (n // TILE for n in GRID)
    return rows.unflatten(1, (h, w, TILE, TILE)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def mean_keys(k: Tensor) -> Tensor:
    """The mean key of the box of each word, [1, 1, words, 32]."""
    picture = in_reading_order(k[0, 0].T)
    boxes = [picture[:, t : t + h, x : x + w].mean((1, 2)) for t, x, h, w in WORDS.values()]
    return F.normalize(torch.stack(boxes), dim=-1)[None, None]


# Measuring


class Row(NamedTuple):
    name: str
    share: float  # of the keys
    error: float
    dq_error: float
    kept: float
    time: float  # over that of dense attention


def timed(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """(the result, the seconds of the fastest call)."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def gradient(out: Tensor, q: Tensor) -> Tensor:
    """The gradient of q for a fixed weighted sum of the outputs."""
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad((out * weights).sum(), q)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm()).item()


def compare(q: Tensor, photo: Photograph, scale: float, repeats: int) -> list[Row]:
    """A row for each number of keys and of blocks, whose output is checked against the bound."""
    k, v = photo.k, photo.v
    q = q.detach().requires_grad_()
    dense, dense_time = timed(lambda: cross_attention(q, k, v, scale=scale), repeats)
    dense_dq, rows = gradient(dense, q), []
    choices = [dict(top_k=n) for n in TOP_K]
    choices += [dict(topk_blocks=(TILE**2, n)) for n in N_BLOCKS]
    for choice in choices:
        out, seconds = timed(lambda c=choice: topk_attention(q, k, v, scale=scale, **c), repeats)
        kept = kept_mass(q, k, scale=scale, **choice)
        check_bound(out, dense, kept, v)
        n = choice.get("top_k") or choice["topk_blocks"][0] * choice["topk_blocks"][1]
        name = "keys" if "top_k" in choice else "blocks"
        errors = distance(out, dense), distance(gradient(out, q), dense_dq)
        rows.append(Row(name, n / k.shape[2], *errors, kept.mean().item(), seconds / dense_time))
    return rows


# Checks


def check_bound(out: Tensor, dense: Tensor, kept: Tensor, v: Tensor) -> None:
    """Raises AssertionError where an output is farther from dense attention than its kept mass
    allows."""
    moved = (out - dense).norm(dim=-1)
    allowed = 2 * (1 - kept) * v.norm(dim=-1).max() + 1e-4  # for rounding
    if (moved > allowed).any():
        worst = (moved - allowed).max().item()
        raise AssertionError(f"an output is {worst:.2g} farther from dense than its mass allows")


def check_all_keys(q: Tensor, photo: Photograph, scale: float) -> None:
    """Raises AssertionError unless the top Nk of Nk keys are dense attention."""
    q = q.detach().requires_grad_()
    k, v = photo.k, photo.v
    dense = cross_attention(q, k, v, scale=scale)
    every = topk_attention(q, k, v, k.shape[2], scale=scale)
    errors = distance(every, dense), distance(gradient(every, q), gradient(dense, q))
    if max(errors) > 1e-4:
        raise AssertionError(f"with all keys out and dq differ from dense by {errors}")


def check_choice(indices: Tensor, q: Tensor, k: Tensor) -> None:
    """Raises AssertionError where a key was chosen [.., Nq, top_k] and a better one was not."""
    scores = q.double() @ k.double().mT
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices.long(), True)
    least = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_other = scores.masked_fill(chosen, -torch.inf).amax(-1)
    if not (chosen.sum(-1) == indices.shape[-1]).all() or (best_other > least + 1e-6).any():
        raise AssertionError("the chosen keys are not those of the highest scores")


# Output


def report(name: str, scale: float, rows: list[Row], entropy: float) -> None:
    print(f"{name}, temperature {1 / scale:g}: a query sees about {math.exp(entropy):.0f} keys")
    print(f"  {'':6} {'keys':>7} {'share':>7} {'kept':>7} {'error':>8} {'of dq':>8} {'time':>6}")
    Nk = GRID[0] * GRID[1]
    for row in rows:
        print(
            f"  {row.name:6} {row.share * Nk:7.0f} {row.share:7.2%} {row.kept:7.1%} "
            f"{row.error:8.2%} {row.dq_error:8.2%} {row.time:6.2f}"
        )


def plot(measured: dict[str, list[Row]], photo: Photograph, folder: Path) -> list[Path]:
    """Writes the errors by the share of keys, and the maps of the words."""
    files = [folder / "sparse_photograph.png", folder / "sparse_photograph_words.png"]
    folder.mkdir(parents=True, exist_ok=True)
    curves = {
        f"{name}, {kind}": [(row.share, row.error) for row in rows if row.name == kind]
        for name, rows in measured.items()
        for kind in ("keys", "blocks")
    }
    viz.sparsity_error(curves, ylabel="relative error of out").savefig(files[0])
    words, top_k = mean_keys(photo.k), 256
    scale = 1 / TEMPERATURES["soft"]
    options = dict(rows=range(len(WORDS)), grid=(1, GRID[0] * GRID[1]), scale=scale)
    dense = in_reading_order(attention_map(words, photo.k, **options)[0, :, 0])
    chosen = topk_attention(words, photo.k, photo.v, top_k, scale=scale, return_indices=True)
    kept = torch.zeros(len(WORDS), photo.k.shape[2]).scatter_(1, chosen.indices[0, 0].long(), 1)
    sparse = dense * in_reading_order(kept)
    sparse = sparse / sparse.sum((1, 2), keepdim=True)
    titles = [*WORDS, *(f"{word}, {top_k} keys" for word in WORDS)]
    maps = torch.cat((dense, sparse))
    viz.attention_overlay(photo.pixels, maps, titles, columns=3).savefig(files[1])
    return files


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the pictures")
    parser.add_argument("--every", type=int, default=16, help="queries are each n-th block")
    parser.add_argument("--repeats", type=int, default=3, help="of each timed call")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    chosen, started = options(arguments), time.perf_counter()
    photo, measured = load(), {}
    blocks = photo.k.unflatten(2, (-1, TILE**2))
    q = blocks[:, :, :: chosen.every].flatten(2, 3)  # whole blocks: 64 neighbours choose together
    for name, temperature in TEMPERATURES.items():
        scale = 1 / temperature
        check_all_keys(q, photo, scale)
        sample = q[:, :, ::16]
        picked = topk_attention(sample, photo.k, photo.v, 64, scale=scale, return_indices=True)
        check_choice(picked.indices, sample, photo.k)
        with_entropy = dict(scale=scale, return_statistics=True, backend="eager")
        entropy = cross_attention(sample, photo.k, photo.v, **with_entropy).entropy.mean().item()
        measured[name] = compare(q, photo, scale, chosen.repeats)
        report(name, scale, measured[name], entropy)
    print("all keys are dense attention, the chosen have the highest scores, the bound holds")
    files = plot(measured, photo, chosen.out)
    print(f"pictures: {', '.join(map(str, files))}; {time.perf_counter() - started:.0f} s")
    return measured


if __name__ == "__main__":
    main()
