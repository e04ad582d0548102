"""BLIP-2's two stages on a CPU: a Q-Former reads a frozen encoder, then feeds a frozen reader.

A picture is a crop of one of scikit-learn's two photographs with a handwritten digit in a corner,
its caption one of 80: "china with the digit seven at top left .". One digit in five and the middle
fifth of each photograph are held out.

Before     A convolutional encoder learns to which digit or photograph each of its features belongs,
           and is frozen. A small language model learns, from text alone, to write a caption after
           its four words in any order, and is frozen.
Stage 1    `QFormer` learns by ITC, ITM and ITG, with one pass for queries, one for text, one for
           pairs and one for generation: the same weights under three masks. The first half has
           random negatives for ITM; the second half is trained twice, with random and with hard
           negatives. (Hard negatives from the start are too hard here: for long the matching head
           learns nothing from them.)
Stage 2    A linear projection of the four queries replaces the four words; nothing else is trained.

The program prints recall at 1 among 80 captions and 80 held-out pictures, before and after stage 1,
by the contrastive similarity and with its eight best reranked by the matching head; how often that
head prefers the true caption to all twelve that differ in one word; and the loss of captions in
stage 2 with the right picture and with another. It raises an AssertionError unless the frozen parts
stay the same bit for bit. It writes two pictures: the losses of stage 1, and where the heads of the
Q-Former look.

    python examples/qformer_alignment.py --out plots

Needs scikit-learn, Pillow and matplotlib: pip install 'xattn-kernels[bench]'.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xattn_kernels as xattn

try:
    from captioned_digits import (
        FIRST,
        LENGTH,
        TOKEN,
        VOCABULARY,
        Album,
        every_content,
        number_of,
        some_content,
        write,
    )

    from xattn_kernels import viz
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install 'xattn-kernels[bench]'")

GRID, DIM, QUERIES = 8, 64, 4  # features along each side, their width, queries of the Q-Former


# Models


class Encoder(nn.Module):
    """An encoder of pictures into GRID x GRID features, which learns by its head `digits`."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides, dilations = (3, 32, DIM, DIM, DIM), (2, 2, 1, 1), (1, 1, 2, 2)
        layers = []
        for n, stride, dilation in zip(range(4), strides, dilations, strict=True):
            options = dict(stride=stride, dilation=dilation, padding=dilation)
            layers += [nn.Conv2d(*widths[n : n + 2], 3, **options), nn.GELU()]
        self.look = nn.Sequential(*layers[:-1])
        self.places = nn.Parameter(torch.randn(GRID**2, DIM) * 0.5)
        self.classify = nn.Linear(DIM, 12)

    def forward(self, images: Tensor) -> Tensor:
        """The features [n, GRID * GRID, DIM] of images [n, 3, SIDE, SIDE]."""
        features = self.look(images).flatten(2).mT
        return F.layer_norm(features, (DIM,)) + self.places

    def digits(self, images: Tensor) -> Tensor:
        """The logits [n, 12, GRID, GRID] of the digit, or else the photograph, at each feature."""
        return self.classify(self.look(images).movedim(1, 3)).movedim(3, 1)


class Aligned(nn.Module):
    """The Q-Former with the heads of stage 1."""

    def __init__(self) -> None:
        super().__init__()
        self.qformer = xattn.QFormer(
            dim=DIM, depth=3, heads=4, dim_visual=DIM, num_queries=QUERIES,
            vocab_size=len(VOCABULARY), max_positions=LENGTH,
        )  # fmt: skip
        for p in self.qformer.parameters():  # BERT's 0.02 is for a width of 768
            if p.dim() > 1:
                nn.init.normal_(p, std=0.2)
        self.vision_proj, self.text_proj = nn.Linear(DIM, 32), nn.Linear(DIM, 32)
        self.itm_head, self.lm_head = nn.Linear(DIM, 2), nn.Linear(DIM, len(VOCABULARY))
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def image(self, features: Tensor) -> Tensor:
        return self.vision_proj(self.qformer(features))

    def text(self, tokens: Tensor) -> Tensor:
        return self.text_proj(self.qformer(None, tokens, objective="itc")[:, 0])

    def match(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The logits [n, QUERIES, 2] of no match and match."""
        return self.itm_head(self.qformer(features, tokens, objective="itm")[:, :QUERIES])

    def losses(self, features, content, hard: bool, generator) -> dict[str, Tensor]:
        """ITC, ITM and ITG of one batch; without `hard` all negatives are equally likely."""
        tokens, ids = write(content), number_of(content)
        image, text = self.image(features), self.text(tokens)
        options = dict(temperature=self.log_temperature.exp(), ids=ids)
        similarity = xattn.image_text_similarity(image, text).detach()
        negatives = xattn.hard_negatives(
            similarity if hard else torch.zeros_like(similarity), sample=True,
            generator=generator, temperature=options["temperature"].detach(), ids=ids,
        )  # fmt: skip
        pairs = xattn.matching_pairs(negatives)
        captions = write(content, "<dec>")
        rows = self.qformer(features, captions, objective="itg")[:, QUERIES:]
        return {
            "itc": xattn.itc_loss(image, text, **options),
            "itm": xattn.itm_loss(
                self.match(features[pairs.images], tokens[pairs.texts]), pairs.labels
            ),
            "itg": xattn.lm_loss(self.lm_head(rows), captions),
        }


class LanguageModel(nn.Module):
    """A causal transformer in plain PyTorch that takes a prefix of embeddings before the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), DIM)
        self.places = nn.Embedding(LENGTH, DIM)
        options = dict(dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, **options) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, len(VOCABULARY))

    def forward(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """The logits [n, m + LENGTH, vocabulary] from prefix [n, m, DIM] and tokens [n, LENGTH]."""
        x = torch.cat((prefix, self.words(tokens) + self.places.weight), dim=1)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=causal, is_causal=True)
        return self.head(self.norm(x))

    def loss(self, prefix: Tensor, content: Tensor) -> Tensor:
        """The mean loss of a caption in nats."""
        tokens = write(content, "<dec>")
        labels = tokens.masked_fill(tokens == TOKEN["<dec>"], -100)
        logits = self(prefix, tokens)
        return xattn.lm_loss(logits, labels, n_prefix=prefix.shape[1]) * (LENGTH - 1)


class Pool(NamedTuple):
    """Features [n, GRID * GRID, DIM] that the frozen encoder computed once, and the content [n, 4]
    of their pictures."""

    features: Tensor
    content: Tensor

    def some(self, n: int, generator: torch.Generator) -> Pool:
        rows = torch.randint(len(self.content), (n,), generator=generator)
        return Pool(self.features[rows], self.content[rows])


@torch.no_grad()
def encode(encoder: Encoder, album: Album, content: Tensor, generator: torch.Generator) -> Pool:
    """The pool of pictures of these contents."""
    parts = [encoder(album.draw(part, generator)) for part in content.split(500)]
    return Pool(torch.cat(parts), content)


# Training


def fit(modules, steps: int, loss_of, rate: float = 3e-3) -> list[float]:
    """The loss of each step of a training of the parameters that require a gradient."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def pretrain_encoder(album: Album, steps: int, generator: torch.Generator) -> Encoder:
    """An encoder that was trained to name the digit or photograph at each feature."""
    encoder = Encoder()

    def loss() -> Tensor:
        content = some_content(32, generator)
        truth = (10 + content[:, 0])[:, None, None, None, None]
        truth = truth.repeat(1, 2, GRID // 2, 2, GRID // 2)
        truth[torch.arange(len(content)), content[:, 2], :, content[:, 3]] = content[
            :, 1, None, None
        ]
        truth = truth.flatten(3).flatten(1, 2)
        return F.cross_entropy(encoder.digits(album.draw(content, generator)), truth)

    fit([encoder], steps, loss)
    return encoder


def pretrain_reader(steps: int, generator: torch.Generator) -> LanguageModel:
    """A language model that was trained to write the caption after its four words in any order."""
    reader = LanguageModel()

    def loss() -> Tensor:
        content = some_content(64, generator)
        order = torch.rand(content.shape, generator=generator).argsort(1)
        return reader.loss(reader.words((FIRST + content).gather(1, order)), content)

    fit([reader], steps, loss)
    return reader


# Measuring


@torch.no_grad()
def recalls(model: Aligned, gallery: Pool, again: int = 8) -> dict[str, float]:
    """Recall at 1 both ways, and as "..., again" with the best `again` reranked by matching."""
    features, tokens = gallery.features, write(gallery.content)
    similarity = xattn.image_text_similarity(model.image(features), model.text(tokens))
    recall = {}
    for name, s in (("image to text", similarity), ("text to image", similarity.T)):
        truth, best = torch.arange(len(s)), s.topk(again, dim=1).indices
        recall[name] = (best[:, 0] == truth).float().mean().item()
        rows = truth[:, None].expand_as(best).flatten(), best.flatten()
        images, texts = rows if name == "image to text" else rows[::-1]
        yes = model.match(features[images], tokens[texts]).mean(1)
        matched = (yes[:, 1] - yes[:, 0]).unflatten(0, best.shape)
        judged = best.gather(1, matched.argmax(1, keepdim=True))[:, 0]
        recall[f"{name}, again"] = (judged == truth).float().mean().item()
    return recall


@torch.no_grad()
def near_misses(model: Aligned, held_out: Pool) -> float:
    """How often the true caption is preferred to the twelve that differ from it in one word."""
    captions = every_content()
    right = []
    for image, truth in zip(*held_out, strict=True):
        near = captions[(captions != truth).sum(1) <= 1]
        yes = model.match(image.expand(len(near), -1, -1), write(near)).mean(1)
        best = near[(yes[:, 1] - yes[:, 0]).argmax()]
        right.append((best == truth).all())
    return torch.stack(right).float().mean().item()


def check_frozen(name: str, module: nn.Module, before: dict[str, Tensor]) -> None:
    """Raises AssertionError unless every parameter is bit for bit that of `before`."""
    changed = [n for n, t in module.state_dict().items() if not torch.equal(t, before[n])]
    if changed:
        raise AssertionError(f"the frozen {name} has changed: {', '.join(changed)}")


# The stages


def align(start: Aligned, pool: Pool, steps: range, seed: int, hard: bool) -> tuple[Aligned, dict]:
    """(a copy of `start` trained in stage 1, {loss: (step, value) pairs})."""
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed + steps.start)
    history, now = {name: [] for name in ("itc", "itm", "itg")}, iter(steps)

    def loss() -> Tensor:
        losses, step = model.losses(*pool.some(32, generator), hard, generator), next(now)
        for name, value in losses.items():
            history[name].append((step, value.item()))
        return sum(losses.values())

    fit([model], len(steps), loss, rate=1e-3 if steps.start else 2e-3)
    return model, history


def generate(
    model: Aligned, reader: LanguageModel, projection: nn.Linear, pool: Pool, steps: int, generator
) -> None:
    """Stage 2: trains the projection of queries to the width of words."""

    def loss() -> Tensor:
        features, content = pool.some(32, generator)
        return reader.loss(projection(model.qformer(features)), content)

    fit([projection], steps, loss, rate=1e-2)


@torch.no_grad()
def head_maps(model: Aligned, features: Tensor) -> Tensor:
    """The maps [B, heads, GRID, GRID] of the first query in the last cross-attention."""
    layers, seen = [x for x in model.qformer.encoder["layer"] if x.crossattention is not None], []
    look = layers[-1].crossattention
    hook = look.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model.qformer(features)
    hook.remove()
    q, k = (
        look.attention[name](x).unflatten(-1, (-1, look.dim_head)).transpose(1, 2)
        for name, x in zip(("query", "key"), seen[0][:2], strict=True)
    )
    return xattn.attention_map(q, k, rows=[0], grid=(GRID, GRID), average_heads=False)[:, :, 0]


# Output


def report(stages: dict[str, Aligned], gallery: Pool, near: Pool) -> None:
    columns = ("image to text", "text to image", "image to text, again", "text to image, again")
    print(f"recall at 1 of {len(gallery.content)}, held out; chance {1 / len(gallery.content):.1%}")
    print(f"{'':18}" + "".join(f"{c:>22}" for c in columns) + f"{'best of 13':>12}")
    for name, model in stages.items():
        recall = recalls(model, gallery)
        cells = "".join(f"{recall[column]:>22.1%}" for column in columns)
        print(f"{name:18}{cells}{near_misses(model, near):>12.1%}")


@torch.no_grad()
def report_reader(model: Aligned, reader, projection: nn.Linear, gallery: Pool) -> None:
    prefix, content = projection(model.qformer(gallery.features)), gallery.content
    right, other = (reader.loss(p, content) for p in (prefix, prefix.roll(1, 0)))
    told = reader.loss(reader.words(FIRST + content), content)
    guess = math.log(len(content))
    print(
        f"stage 2, nats per held-out caption: {right:.2f} with its picture, {other:.2f} with "
        f"another one,\n  {told:.2f} when told the four words; a guess costs {guess:.2f}"
    )


def plot(histories: dict, model: Aligned, features: Tensor, image: Tensor, folder: Path) -> list:
    """Writes the losses of stage 1, and where a query looks in one held-out picture."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "qformer_alignment.png", folder / "qformer_alignment_heads.png"]
    viz.history(histories, ("itc", "itm", "itg")).savefig(files[0])
    maps = head_maps(model, features)[0]
    words = [f"head {n + 1}" for n in range(len(maps))]
    picture = viz.attention_overlay((image + 1) / 2, maps, words, columns=5)
    picture.savefig(files[1])
    return files


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=300, help="of each training but the encoder's")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen, started = options(arguments), time.perf_counter()
    torch.manual_seed(chosen.seed)
    seed, n, generator = chosen.seed, chosen.steps, torch.Generator().manual_seed(chosen.seed)
    album, others = Album(held_out=False), Album(held_out=True)
    encoder = pretrain_encoder(album, 5 * n, generator).eval()
    reader = pretrain_reader(n, generator).eval()
    pool = encode(encoder, album, some_content(4000, generator), generator)
    pictures = others.draw(every_content(), generator)
    with torch.no_grad():
        gallery = Pool(encoder(pictures), every_content())
    near = encode(encoder, others, some_content(160, generator), generator)

    stages, histories = {"before": Aligned()}, {}
    first = xattn.alignment_stage(vision_encoder=encoder, qformer=stages["before"].qformer)
    for name, start, steps, hard in (
        ("first half", "before", range(n), False),
        ("random on", "first half", range(n, 2 * n), False),
        ("hard on", "first half", range(n, 2 * n), True),
    ):
        stages[name], histories[name] = align(stages[start], pool, steps, seed, hard)
    report(stages, gallery, near)
    first.undo()

    model, projection = stages["hard on"], nn.Linear(DIM, DIM)
    parts = dict(vision_encoder=encoder, qformer=model.qformer, language_model=reader)
    xattn.generation_stage(**parts, projection=projection)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    generate(model, reader, projection, pool, n, generator)
    report_reader(model, reader, projection, gallery)
    for name, part in parts.items():
        check_frozen(name, part, before[name])
    print(f"bit for bit what they were: {', '.join(parts)}")
    files = plot(histories, model, gallery.features[47:48], pictures[47], chosen.out)
    print(f"pictures: {', '.join(map(str, files))}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
