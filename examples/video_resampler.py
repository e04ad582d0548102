"""A resampler over clips of one to eight frames: a fixed number of latents, whatever the length.

A clip is a handwritten digit that walks over a photograph, to the left or to the right, and that
is exchanged for another one on the way. Small convolutions make 36 tokens of every frame;
`PerceiverResampler` reads those of all frames into 8 latents, with an embedding for each frame's
place in time, and four linear heads answer from the latents:

    first, last     which digit was it at the beginning, which at the end?
    direction       where to does it walk? (of clips of one frame nobody knows)
    frames          how many are there?

Clips of a batch are padded to eight frames, with noise, and `key_lengths` says how many tokens are
real. The digits and crops of the printed accuracies were not trained on. Checked, and an
AssertionError where it does not hold:

    padding         whatever it holds, no bit of an output changes
    batches         a clip alone, without padding, gives what it gives in a batch, to rounding

Three pictures show where some latents look in a clip, how much of each frame all of them take, and
which tokens are real in a batch.

    python examples/video_resampler.py --out plots

Needs scikit-learn, Pillow and matplotlib: pip install 'xattn-kernels[bench]'.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels import KeyInterval, PerceiverResampler, attention_map

try:
    from sklearn.datasets import load_digits, load_sample_images

    from xattn_kernels import viz
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install 'xattn-kernels[bench]'")

FRAMES, SIDE, GRID = 8, 24, 6  # at most; pixels and tokens along each side of a frame
DIGIT = 12  # pixels along each side
ANSWERS = {"first": 10, "last": 10, "direction": 2, "frames": FRAMES}
UNKNOWN = -100


# Clips


class Clips(NamedTuple):
    """frames [n, FRAMES, 3, SIDE, SIDE] in [-1, 1], of which lengths [n] are real and the rest is
    noise; answers [n, 4] in the order of `ANSWERS`."""

    frames: Tensor
    lengths: Tensor
    answers: Tensor


class Album:
    """Clips of one split: digits and backgrounds that the other split does not have."""

    def __init__(self, held_out: bool) -> None:
        data = load_digits()
        chosen = (torch.arange(len(data.images)) % 5 == 0) == held_out
        paper = 1 - torch.from_numpy(data.images).float()[chosen] / 16
        self.digits = F.interpolate(paper[:, None], (DIGIT, DIGIT), mode="bilinear")
        self.labels = torch.from_numpy(data.target)[chosen]
        self.photographs = []
        for photo in load_sample_images().images:
            pixels = torch.tensor(photo).permute(2, 0, 1)[None] / 255
            small = F.interpolate(pixels, scale_factor=0.25, mode="area")[0]
            border = small.shape[2] * 4 // 5
            self.photographs.append(small[..., border:] if held_out else small[..., :border])

    def clips(self, n: int, generator: torch.Generator) -> Clips:
        """Every length is as likely as the next."""

        def draw(high: int | Tensor, *shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * high).long()

        lengths, direction = 1 + draw(FRAMES, n), draw(2, n)
        digits = draw(len(self.digits), n, 2)
        change = 1 + draw((lengths - 1).clamp(min=1), n)  # the frame of the second digit
        frames = torch.rand(n, FRAMES, 3, SIDE, SIDE, generator=generator)
        backgrounds, row = self._backgrounds(n, generator), draw(SIDE - DIGIT + 1, n)
        for i, length in enumerate(lengths.tolist()):
            frames[i, :length] = backgrounds[i]
            steps = torch.linspace(0, SIDE - DIGIT, FRAMES).long()[:length]
            for t, column in enumerate(steps.flip(0) if direction[i] == 0 else steps):
                digit = self.digits[digits[i, int(t >= change[i])]]
                frames[i, t, :, row[i] : row[i] + DIGIT, column : column + DIGIT] = digit
        shown = torch.where((lengths > 1)[:, None], digits, digits[:, :1])
        known = torch.where(lengths > 1, direction, UNKNOWN)
        answers = torch.stack([*self.labels[shown].T, known, lengths - 1], dim=1)
        return Clips(frames * 2 - 1, lengths, answers)

    def _backgrounds(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, 3, SIDE, SIDE], crops of either photograph."""
        found = []
        for which, top, left in torch.rand(n, 3, generator=generator).tolist():
            photo = self.photographs[int(2 * which)]
            top, left = (
                int(u * (size - SIDE + 1))
                for u, size in zip((top, left), photo.shape[1:], strict=True)
            )
            found.append(photo[:, top : top + SIDE, left : left + SIDE])
        return torch.stack(found)


# The model


class VideoModel(nn.Module):
    def __init__(self, dim: int = 64, num_latents: int = 8) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.places = nn.Parameter(torch.randn(GRID**2, dim) * 0.1)
        self.resampler = PerceiverResampler(
            dim=dim, depth=2, dim_head=16, heads=4, num_latents=num_latents, max_num_frames=FRAMES
        )
        self.answers = nn.Linear(num_latents * dim, sum(ANSWERS.values()))

    def forward(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        """frames [B, F, 3, SIDE, SIDE], lengths [B] -> logits [B, .] of each answer."""
        tokens = self.look(frames.flatten(0, 1)).flatten(2).transpose(1, 2) + self.places
        tokens = tokens.unflatten(0, frames.shape[:2])[:, None]  # [B, 1, F, GRID * GRID, dim]
        latents = self.resampler(tokens, key_lengths=lengths * GRID**2)
        return self.answers(latents.flatten(1)).split(list(ANSWERS.values()), dim=1)

    @torch.no_grad()
    def maps(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Where each latent looks in the last layer, frames side by side: [B, num_latents, GRID,
        F * GRID]. What it looks at in the latents themselves is left out."""
        attend, seen = self.resampler.layers[-1][0], []
        hook = attend.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        self(frames, lengths)
        hook.remove()
        x, latents, mask = seen[0]
        x, latents = attend.norm_media(x), attend.norm_latents(latents)
        q = attend.to_q(latents)
        k = attend.to_kv(torch.cat((latents, x), dim=1)).chunk(2, dim=-1)[0]
        q, k = (t.unflatten(-1, (-1, attend.dim_head)).transpose(1, 2) for t in (q, k))
        n, F_ = latents.shape[1], frames.shape[1]
        options = dict(rows=range(n), grid=(F_ * GRID, GRID), first_key=n, mask=mask)
        return attention_map(q, k, **options).unflatten(2, (F_, GRID)).transpose(2, 3).flatten(3)


def train(model: VideoModel, album: Album, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1)
    for step in range(steps):
        frames, lengths, answers = album.clips(64, generator)
        logits = model(frames, lengths)
        losses = [
            F.cross_entropy(a, b, ignore_index=UNKNOWN)
            for a, b in zip(logits, answers.unbind(1), strict=True)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
        if step % max(steps // 5, 1) == 0:
            text = "  ".join(f"{n} {loss:.2f}" for n, loss in zip(ANSWERS, losses, strict=True))
            print(f"step {step:4d}  loss of  {text}", flush=True)


# Checks


@torch.no_grad()
def check_padding(model: VideoModel, clips: Clips) -> None:
    """Raises AssertionError where an output depends on what is in the frames that are none."""
    frames, lengths, _ = clips
    real = torch.arange(FRAMES) < lengths[:, None]
    blank = torch.where(real[..., None, None, None], frames, 0.0)
    for name, a, b in zip(ANSWERS, model(frames, lengths), model(blank, lengths), strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"the answer for {name} depends on what padding holds")


@torch.no_grad()
def check_alone(model: VideoModel, clips: Clips) -> None:
    """Raises AssertionError where a clip has other answers alone than padded and in a batch."""
    together = torch.cat(model(*clips[:2]), dim=1)
    for i, length in enumerate(clips.lengths.tolist()):
        alone = model(clips.frames[i : i + 1, :length], clips.lengths[i : i + 1])
        error = (torch.cat(alone, dim=1)[0] - together[i]).abs().max().item()
        if error > 1e-4 * together.abs().max().item():
            raise AssertionError(f"a clip of {length} frames differs by {error:.2g} alone")


# What the program shows


@torch.no_grad()
def report(model: VideoModel, clips: Clips) -> dict[str, float]:
    """Prints the accuracies by length, and returns those of all lengths."""
    logits = model(*clips[:2])
    right = torch.stack([a.argmax(1) for a in logits], dim=1) == clips.answers
    known = clips.answers != UNKNOWN
    print("right of held-out clips, by their number of frames; n are", len(right))
    print("frames   " + "".join(f"{n:>8}" for n in range(1, FRAMES + 1)) + "     all  chance")
    found = {}
    for i, (name, n) in enumerate(ANSWERS.items()):
        cells = []
        for length in range(1, FRAMES + 1):
            rows = (clips.lengths == length) & known[:, i]
            cells.append(f"{right[rows, i].float().mean():8.0%}" if rows.any() else f"{'-':>8}")
        found[name] = right[known[:, i], i].float().mean().item()
        print(f"{name:9}{''.join(cells)}{found[name]:8.0%}{1 / n:8.0%}")
    return found


def plot(model: VideoModel, clips: Clips, folder: Path) -> list[Path]:
    """Latents over the frames of the longest clip, on them and as a matrix; a batch's intervals."""
    files = [folder / f"video_resampler{part}.png" for part in ("", "_frames", "_lengths")]
    folder.mkdir(parents=True, exist_ok=True)
    i = clips.lengths.argmax()
    length = clips.lengths[i].item()
    frames = clips.frames[i : i + 1, :length]
    maps = model.maps(frames, clips.lengths[i : i + 1])[0]
    strip = ((frames[0] + 1) / 2).permute(1, 2, 0, 3).flatten(2)  # [3, SIDE, length * SIDE]
    chosen = maps.flatten(1).amax(1).argsort(descending=True)[:4]  # the sharpest
    words = [f"latent {n}" for n in chosen.tolist()]
    viz.attention_overlay(strip, maps[chosen], words, columns=1, width=9).savefig(files[0])

    by_frame = maps.unflatten(2, (length, GRID)).sum((1, 3))
    frames = [f"frame {n + 1}" for n in range(FRAMES)]
    latents = [f"latent {n}" for n in range(len(maps))]
    heat = viz.attention_heatmap(by_frame, queries=latents, keys=frames[:length])
    heat.savefig(files[1])

    real = (clips.lengths[:16] * GRID**2).int()
    names = [f"clip {n}" for n in range(len(real))]
    rows = KeyInterval(torch.zeros_like(real), real)  # a row for each clip
    viz.mask_picture(rows, FRAMES * GRID**2, queries=names, blocks=frames).savefig(files[2])
    return files


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    chosen, started = options(arguments), time.perf_counter()
    torch.manual_seed(chosen.seed)
    generator = torch.Generator().manual_seed(chosen.seed)
    model = VideoModel()
    train(model, Album(held_out=False), chosen.steps, generator)
    held_out = Album(held_out=True).clips(1024, generator)
    check_padding(model, held_out)
    print("whatever padding holds, the answers are the same, bit for bit")
    check_alone(model, Clips(*(t[:32] for t in held_out)))
    print("clips alone, without padding, have the answers that they have in a batch")
    accuracies = report(model, held_out)
    files = plot(model, held_out, chosen.out)
    print(f"pictures: {', '.join(map(str, files))}; {time.perf_counter() - started:.0f} s")
    return accuracies


if __name__ == "__main__":
    main()
