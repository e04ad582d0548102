"""A resampler of clips of one to eight frames into a fixed number of latents.

A clip is a handwritten digit that moves over a photograph, to the left or to the right, and is
replaced by another digit on the way. Small convolutions turn every frame into 36 tokens;
`PerceiverResampler` reads those of all frames into 8 latents, with an embedding for each frame's
position in time, and four linear heads answer from the latents:

    first, last     which digit was it at the beginning, and which at the end?
    direction       in which direction does it move? (clips of one frame do not show it)
    frames          how many frames are there?

Clips of a batch are padded to eight frames with noise, and `key_lengths` tells how many tokens are
real. The digits and crops of the printed accuracies are held out. The program checks, and raises an
AssertionError where one does not hold:

    padding         the contents of padding change no bit of an output
    batches         a clip alone, without padding, gives the outputs that it has in a batch, to
                    rounding

Three pictures show where some latents look in a clip, how much attention each frame gets from all
of them, and which tokens are real in a batch.

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
    from captioned_digits import picture_features
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
    """Clips: frames [n, FRAMES, 3, SIDE, SIDE] in [-1, 1], of which the first lengths [n] are real
    and the others noise, and answers [n, 4] in the order of `ANSWERS`."""

    frames: Tensor
    lengths: Tensor
    answers: Tensor


class Album:
    """The clips of one split, with digits and backgrounds that the other split does not have."""

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
        """Random clips, whose lengths are all equally likely."""

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
        direction = torch.where(lengths > 1, direction, UNKNOWN)
        answers = torch.stack([*self.labels[shown].T, direction, lengths - 1], dim=1)
        return Clips(frames * 2 - 1, lengths, answers)

    def _backgrounds(self, n: int, generator: torch.Generator) -> Tensor:
        """Crops [n, 3, SIDE, SIDE] of either photograph."""
        crops = []
        for which, top, left in torch.rand(n, 3, generator=generator).tolist():
            photo = self.photographs[int(2 * which)]
            top, left = (
                int(u * (size - SIDE + 1))
                for u, size in zip((top, left), photo.shape[1:], strict=True)
            )
            crops.append(photo[:, top : top + SIDE, left : left + SIDE])
        return torch.stack(crops)


# The model


class VideoModel(nn.Module):
    """A model that answers questions on clips from the latents of a resampler."""

    def __init__(self, dim: int = 64, num_latents: int = 8) -> None:
        super().__init__()
        self.look = picture_features(dim)
        self.places = nn.Parameter(torch.randn(GRID**2, dim) * 0.1)
        self.resampler = PerceiverResampler(
            dim=dim, depth=2, dim_head=16, heads=4, num_latents=num_latents, max_num_frames=FRAMES
        )
        self.answers = nn.Linear(num_latents * dim, sum(ANSWERS.values()))

    def forward(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        """The logits [B, .] of each answer, from frames [B, F, 3, SIDE, SIDE] and lengths [B]."""
        tokens = self.look(frames.flatten(0, 1)).flatten(2).transpose(1, 2) + self.places
        tokens = tokens.unflatten(0, frames.shape[:2])[:, None]  # [B, 1, F, GRID * GRID, dim]
        latents = self.resampler(tokens, key_lengths=lengths * GRID**2)
        return self.answers(latents.flatten(1)).split(list(ANSWERS.values()), dim=1)

    @torch.no_grad()
    def maps(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """The maps [B, num_latents, GRID, F * GRID] of each latent over adjacent frames in the last
        layer, without its attention to the latents."""
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
    """Raises AssertionError where an output depends on the contents of padding."""
    frames, lengths, _ = clips
    real = torch.arange(FRAMES) < lengths[:, None]
    blank = torch.where(real[..., None, None, None], frames, 0.0)
    for name, a, b in zip(ANSWERS, model(frames, lengths), model(blank, lengths), strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"the answer for {name} depends on what padding holds")


@torch.no_grad()
def check_alone(model: VideoModel, clips: Clips) -> None:
    """Raises AssertionError where the answers for a clip differ alone and in a padded batch."""
    together = torch.cat(model(*clips[:2]), dim=1)
    for i, length in enumerate(clips.lengths.tolist()):
        alone = model(clips.frames[i : i + 1, :length], clips.lengths[i : i + 1])
        error = (torch.cat(alone, dim=1)[0] - together[i]).abs().max().item()
        if error > 1e-4 * together.abs().max().item():
            raise AssertionError(f"a clip of {length} frames differs by {error:.2g} alone")


# Output


@torch.no_grad()
def report(model: VideoModel, clips: Clips) -> dict[str, float]:
    """The accuracies over all lengths, after those by length were printed."""
    logits = model(*clips[:2])
    right = torch.stack([a.argmax(1) for a in logits], dim=1) == clips.answers
    has_answer = clips.answers != UNKNOWN
    print("right of held-out clips, by their number of frames; n are", len(right))
    print("frames   " + "".join(f"{n:>8}" for n in range(1, FRAMES + 1)) + "     all  chance")
    accuracies = {}
    for i, (name, n) in enumerate(ANSWERS.items()):
        cells = []
        for length in range(1, FRAMES + 1):
            rows = (clips.lengths == length) & has_answer[:, i]
            cells.append(f"{right[rows, i].float().mean():8.0%}" if rows.any() else f"{'-':>8}")
        accuracies[name] = right[has_answer[:, i], i].float().mean().item()
        print(f"{name:9}{''.join(cells)}{accuracies[name]:8.0%}{1 / n:8.0%}")
    return accuracies


def plot(model: VideoModel, clips: Clips, folder: Path) -> list[Path]:
    """Writes the maps of latents over the longest clip, their sums by frame, and intervals."""
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
