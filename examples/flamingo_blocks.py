"""A frozen language model learns to see: gated cross-attention blocks between its layers.

1. A small causal language model in plain PyTorch learns the language of captions, from text alone.
2. It is frozen, and `GatedCrossAttentionBlock`s are put between its layers. In them each word
   attends to the patches of the last picture before it. Only the blocks and the small convolutions
   that turn pictures into patches are trained.
3. It writes captions for held-out pictures, with a cache of the projected patches.

A picture is a crop of one of scikit-learn's two sample photographs, with a handwritten digit in one
of its corners, and each document holds two pictures with their captions:

    <start> <image> china with the digit seven at top left . <image> flower with the digit ...

One digit in five and the right fifth of each photograph are held out. The program checks that the
language model stays the same bit for bit, and that with the gates at 0 so do its outputs. It writes
a plot of the loss, the gates, and the attention from which the word for the digit is predicted.

    python examples/flamingo_blocks.py --out plots

Needs scikit-learn, Pillow and matplotlib: pip install 'xattn-kernels[bench]'.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from xattn_kernels import GatedCrossAttentionBlock, MediaCache, attention_weights, masks

try:
    import matplotlib
    from captioned_digits import KINDS, picture_features

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_digits, load_sample_images
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install 'xattn-kernels[bench]'")

CAPTION = "<image> {photo} with the digit {digit} at {row} {column} ."
VOCABULARY = ["<start>", *[word for word in CAPTION.split() if "{" not in word]]
VOCABULARY += [word for words in KINDS.values() for word in words]
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
SLOTS = {kind: CAPTION.split().index(f"{{{kind}}}") for kind in KINDS}
LENGTH = len(CAPTION.split())
PICTURES = 2  # in each document
SIDE, GRID = 32, 8  # pixels and patches, along each side of a picture


# Pictures and captions


class Album:
    """The documents of one split, with digits and crops that the other split does not have."""

    def __init__(self, held_out: bool) -> None:
        digits = load_digits()
        chosen = (torch.arange(len(digits.images)) % 5 == 0) == held_out
        ink = torch.from_numpy(digits.images).float()[chosen] / 16
        paper = (1 - ink)[:, None].expand(-1, 3, -1, -1)
        self.digits = F.interpolate(paper, (SIDE // 2, SIDE // 2), mode="bilinear")
        self.labels = torch.from_numpy(digits.target)[chosen]
        photographs = map(torch.tensor, load_sample_images().images)
        self.crops = torch.stack([crops(photo, held_out) for photo in photographs])

    def documents(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens [n, 1 + PICTURES * LENGTH] and images [n, PICTURES, 3, SIDE, SIDE] in [-1, 1]."""

        def draw(high: int) -> Tensor:
            return torch.randint(high, (n * PICTURES,), generator=generator)

        digit, photo, row, column = draw(len(self.digits)), draw(2), draw(2), draw(2)
        images = self.crops[photo, draw(self.crops.shape[1])]
        # [n * PICTURES, 3, row, SIDE / 2, column, SIDE / 2]
        corners = images.unflatten(3, (2, -1)).unflatten(2, (2, -1))
        corners[torch.arange(len(images)), :, row, :, column] = self.digits[digit]
        content = torch.stack([photo, self.labels[digit], row, column], dim=1)
        return write(content.unflatten(0, (n, PICTURES))), images.unflatten(
            0, (n, PICTURES)
        ) * 2 - 1


def crops(photograph: Tensor, held_out: bool, number: int = 1000) -> Tensor:
    """Squares [number, 3, SIDE, SIDE] in [0, 1] from a photograph [height, width, 3] of bytes: from
    its right fifth if they are held out, else from the rest."""
    pixels = photograph.permute(2, 0, 1)[None] / 255
    border = pixels.shape[3] * 4 // 5
    pixels = pixels[..., border:] if held_out else pixels[..., :border]
    generator, squares = torch.Generator().manual_seed(int(held_out)), []
    for size, top, left in torch.rand(number, 3, generator=generator).tolist():
        size = int(64 + 64 * size)
        top, left = int(top * (pixels.shape[2] - size)), int(left * (pixels.shape[3] - size))
        square = pixels[..., top : top + size, left : left + size]
        squares.append(F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)[0])
    return torch.stack(squares)


def write(content: Tensor) -> Tensor:
    """The tokens [n, 1 + PICTURES * LENGTH] of captions, from the numbers [n, PICTURES, 4] of the
    words of each kind."""
    caption = torch.tensor([TOKEN.get(word, 0) for word in CAPTION.split()])
    tokens = caption.repeat(*content.shape[:2], 1)
    for kind, which in zip(KINDS, content.unbind(2), strict=True):
        tokens[..., SLOTS[kind]] = TOKEN[KINDS[kind][0]] + which
    return F.pad(tokens.flatten(1), (1, 0), value=TOKEN["<start>"])


def random_text(n: int, generator: torch.Generator) -> Tensor:
    """The tokens [n, 1 + PICTURES * LENGTH] of random captions without pictures."""
    kinds = [torch.randint(len(w), (n, PICTURES), generator=generator) for w in KINDS.values()]
    return write(torch.stack(kinds, dim=2))


def read(tokens: Tensor) -> str:
    return " ".join(VOCABULARY[i] for i in tokens)


# Models


class LanguageModel(nn.Module):
    """A plain causal transformer, which takes no pictures."""

    def __init__(self, dim: int = 64, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), dim)
        self.places = nn.Embedding(1 + PICTURES * LENGTH, dim)
        options = dict(dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, **options) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits [B, N, vocabulary] of the next tokens, from tokens [B, N]."""
        x, causal = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, src_mask=causal, is_causal=True)
        return self.head(self.norm(x))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(the embeddings [B, N, dim] of tokens [B, N], the causal mask [N, N])."""
        N = tokens.shape[1]
        x = self.words(tokens) + self.places.weight[:N]
        return x, nn.Transformer.generate_square_subsequent_mask(N)


class SeeingModel(nn.Module):
    """The frozen language model, with a gated block before every second layer."""

    def __init__(self, lm: LanguageModel, dim: int = 64) -> None:
        super().__init__()
        self.lm = lm.requires_grad_(False)
        self.look = picture_features(dim)
        self.places = nn.Parameter(torch.randn(GRID**2, dim) * 0.1)
        self.norm = nn.LayerNorm(dim)
        sizes = dict(dim=lm.head.in_features, dim_visual=dim, dim_head=16, heads=4)
        self.blocks = nn.ModuleList(GatedCrossAttentionBlock(**sizes) for _ in lm.layers[::2])

    def patches(self, images: Tensor) -> Tensor:
        """The media [B, T, GRID * GRID, dim] of the blocks, from images [B, T, 3, SIDE, SIDE]."""
        x = self.look(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        return self.norm(x + self.places).unflatten(0, images.shape[:2])

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The logits [B, N, vocabulary]; each token sees the last picture at or before it."""
        return self.read(tokens, [self.patches(images)] * len(self.blocks))

    def read(self, tokens: Tensor, media: list[Tensor] | list[MediaCache]) -> Tensor:
        """The logits as in `forward`, from the patches or the cache for each block."""
        x, causal = self.lm.embed(tokens)
        for i, layer in enumerate(self.lm.layers):
            if i % 2 == 0:
                x = self.blocks[i // 2](x, media[i // 2], media_locations=image_here(tokens))
            x = layer(x, src_mask=causal, is_causal=True)
        return self.lm.head(self.lm.norm(x))

    def gates(self) -> list[float]:
        """tanh of the attention and the feed-forward gate of each block."""
        return [gate.item() for block in self.blocks for gate in block.gates().values()]


def image_here(tokens: Tensor) -> Tensor:
    return tokens == TOKEN["<image>"]


def nats_per_caption(logits: Tensor, tokens: Tensor) -> Tensor:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return loss / (len(tokens) * PICTURES)


# Training


def pretrain(generator: torch.Generator, steps: int = 200) -> LanguageModel:
    """A language model that was trained on captions without pictures."""
    lm = LanguageModel()
    optimizer = torch.optim.AdamW(lm.parameters())
    schedule = lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for _ in range(steps):
        tokens = random_text(16, generator)
        loss = nats_per_caption(lm(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lm.eval()


def train(
    model: SeeingModel,
    album: Album,
    held_out: tuple[Tensor, Tensor],
    steps: int,
    generator: torch.Generator,
) -> dict[str, list]:
    """The history of a training of the new parts: {"loss", "gates", "measured", "held out"}.

    It has the loss and the gates of every step, and for the steps in "measured" the loss on the
    `held_out` tokens and images.
    """
    gates = [gate for block in model.blocks for gate in (block.attn_gate, block.ff_gate)]
    fixed = {*gates, *model.lm.parameters()}
    others = [p for p in model.parameters() if p not in fixed]
    groups = [dict(params=others), dict(params=gates, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups)
    rates = [3e-3, 2e-2]  # a step of Adam is about its rate, and gates start far from their values
    schedule = lr_scheduler.OneCycleLR(optimizer, rates, steps + 1, pct_start=0.2)
    history = {"loss": [], "gates": [], "measured": [], "held out": []}
    for step in range(steps + 1):
        tokens, images = album.documents(32, generator)
        loss = nats_per_caption(model(tokens, images), tokens)
        history["loss"].append(loss.item())
        history["gates"].append(model.gates())
        if step % max(steps // 8, 1) == 0 or step == steps:
            measure(model, held_out, history)
        if step == steps:
            return history
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: SeeingModel, held_out: tuple[Tensor, Tensor], history: dict[str, list]) -> None:
    """Adds the loss on held-out documents to the history and prints a line of the log."""
    tokens, images = held_out
    step, loss = len(history["loss"]) - 1, nats_per_caption(model(tokens, images), tokens).item()
    history["measured"].append(step)
    history["held out"].append(loss)
    gates = " ".join(f"{gate:+.2f}" for gate in history["gates"][-1])
    print(f"step {step:4d}  train {history['loss'][-1]:.3f}  held out {loss:.3f}  gates {gates}")


# Checks


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors are the same bit for bit, 0 and -0 being different."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@torch.no_grad()
def check_frozen(lm: LanguageModel, before: LanguageModel, tokens: Tensor) -> None:
    """Raises AssertionError unless parameters and logits are bit for bit those of `before`."""
    kept = before.state_dict()
    changed = [name for name, t in lm.state_dict().items() if not same_bits(t, kept[name])]
    if changed:
        raise AssertionError(f"the frozen language model has changed: {', '.join(changed)}")
    if not same_bits(lm(tokens), before(tokens)):
        raise AssertionError("the frozen language model has other logits than before")


@torch.no_grad()
def check_closed(model: SeeingModel, before: LanguageModel, documents: tuple) -> None:
    """Raises AssertionError unless the gates are 0 and pictures change no bit of a logit."""
    tokens, images = documents
    if any(model.gates()):
        raise AssertionError(f"the gates are not 0: {model.gates()}")
    if not same_bits(model(tokens, images), before(tokens)):
        raise AssertionError("with the gates at 0 the logits are not those of the language model")


@torch.no_grad()
def closed(model: SeeingModel) -> SeeingModel:
    """A copy with the gates at 0."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn_gate.zero_()
        block.ff_gate.zero_()
    return model


# Captions and attention maps


@torch.no_grad()
def captions(model: SeeingModel, images: Tensor) -> Tensor:
    """The tokens [B, 1 + PICTURES * LENGTH] of captions for images [B, PICTURES, 3, SIDE, SIDE].

    After each <image> every next word is the likeliest one. Each block projects the patches once.
    """
    patches = model.patches(images)
    media = [block.cache_media(patches) for block in model.blocks]
    tokens = torch.full((len(images), 1), TOKEN["<start>"])
    for place in range(PICTURES * LENGTH):
        following = model.read(tokens, media)[:, -1].argmax(-1)
        if place % LENGTH == 0:
            following.fill_(TOKEN["<image>"])
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens


def by_caption(tokens: Tensor) -> Tensor:
    """The tokens [B, 1 + PICTURES * LENGTH, ...] as [B, PICTURES, LENGTH, ...], without <start>."""
    return tokens[:, 1:].unflatten(1, (PICTURES, LENGTH))


@torch.no_grad()
def attention_maps(model: SeeingModel, documents: tuple[Tensor, Tensor]) -> Tensor:
    """The attention [B, PICTURES, GRID, GRID] over the patches in the last block, the mean of its
    heads, of the token before the word for the digit."""
    tokens, images = documents
    block, inputs = model.blocks[-1], []
    hook = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model(tokens, images)
    hook.remove()
    attn, k = block.attn, block.cache_media(model.patches(images)).k
    q = attn.to_q(attn.norm(inputs[0])).unflatten(-1, (-1, attn.dim_head)).transpose(1, 2)
    seen = masks.media(image_here(tokens), tokens_per_media=GRID**2, n_media=PICTURES)
    weights = by_caption(attention_weights(q, k, mask=seen))[:, :, SLOTS["digit"] - 1]
    # each token sees the picture of its caption only
    per_picture = weights.unflatten(-1, (PICTURES, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2)
    return per_picture.unflatten(-1, (GRID, GRID))


# Output


def report(written: Tensor, tokens: Tensor, maps: Tensor) -> None:
    """Prints how many words of the held-out captions are right, and some captions."""
    written, tokens = by_caption(written).flatten(0, 1), by_caption(tokens).flatten(0, 1)
    right = written == tokens
    print(f"held-out captions, words one after the other, right of {len(right)}:")
    for kind, slot in SLOTS.items():
        print(f"  {kind:7} {right[:, slot].float().mean():6.1%}, chance {1 / len(KINDS[kind]):.0%}")
    print(f"  all     {right.all(1).float().mean():6.1%}")
    row, column = (tokens[:, SLOTS[kind]] - TOKEN[KINDS[kind][0]] for kind in ("row", "column"))
    quarters = maps.flatten(0, 1).unflatten(2, (2, -1)).unflatten(1, (2, -1)).sum((2, 4))
    share = quarters[torch.arange(len(quarters)), row, column].mean()
    print(f"attention on the digit's quarter of the picture: {share:.0%}, uniform 25%")
    for i in range(3):
        print(f"  truth   {read(tokens[i])}\n  written {read(written[i])}")


def plot(history: dict, alone: float, images: Tensor, maps: Tensor, text: str, file: Path) -> None:
    """Plots loss, gates, and images [PICTURES, 3, SIDE, SIDE] with maps [PICTURES, GRID, GRID]."""
    figure, (losses, gates, picture) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    losses.plot(history["loss"], lw=1, label="training")
    losses.plot(history["measured"], history["held out"], "o-", label="held out")
    losses.axhline(alone, color="black", ls="--", label="language only, held out")
    losses.set(title="Loss of a caption", xlabel="step", ylabel="nats", ylim=(0, None))
    losses.legend()
    names = [f"{block}, {kind}" for block in ("first", "last") for kind in ("attention", "ff")]
    gates.plot(history["gates"], label=names)
    gates.axhline(0, color="black", lw=0.5)
    gates.set(title="Gates of the two blocks", xlabel="step", ylabel="tanh(gate)")
    gates.legend()
    draw_maps(picture, images, maps)
    picture.set(title=text)
    figure.savefig(file, dpi=100)


def draw_maps(axes: plt.Axes, images: Tensor, maps: Tensor) -> None:
    """Draws the images side by side, and below them their maps over their grey values."""
    shown = torch.cat([*(images + 1) / 2], dim=2).clamp(0, 1)
    grey, weights = shown.mean(0), torch.cat([*maps], dim=1)
    height, width = grey.shape
    axes.imshow(shown.permute(1, 2, 0), extent=(0, width, height, 0))
    below = dict(extent=(0, width, 2 * height + 1, height + 1))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, **below)
    heat = axes.imshow(weights, cmap="inferno", alpha=0.6, vmin=0, **below)
    axes.figure.colorbar(heat, ax=axes, label="attention")
    axes.set(xlim=(0, width), ylim=(2 * height + 1, 0), xticks=[], yticks=[])
    axes.set_xlabel(
        "attention over patches where the word\nfor the digit is next (last block, mean of heads)"
    )


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the plot")
    parser.add_argument("--steps", type=int, default=360, help="training steps of the new parts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen, started = options(arguments), (time.perf_counter(), time.process_time())
    torch.manual_seed(chosen.seed)
    generator = torch.Generator().manual_seed(chosen.seed)
    lm = pretrain(generator)
    held_out = tokens, images = Album(held_out=True).documents(128, generator)
    with torch.no_grad():
        alone = nats_per_caption(lm(tokens), tokens).item()
    blind = sum(math.log(len(words)) for words in KINDS.values())
    print(f"language only, held out: {alone:.3f} nats per caption; at best, blind: {blind:.3f}")

    before, model = copy.deepcopy(lm), SeeingModel(lm)
    check_closed(model, before, held_out)
    print("gates at 0: with pictures the outputs are those of the language model, bit for bit")
    history = train(model, Album(held_out=False), held_out, chosen.steps, generator)
    check_frozen(model.lm, before, tokens)
    print("the language model is bit for bit what it was")
    check_closed(closed(model), before, held_out)
    print("gates set back to 0: outputs bit for bit those of the language model")

    loss = history["held out"][-1]
    print(f"held out: {loss:.3f} nats per caption with pictures, {alone:.3f} without")
    written, maps = captions(model, images), attention_maps(model, held_out)
    report(written, tokens, maps)
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "flamingo_blocks.png"
    text = "\n".join(read(caption[1:]) for caption in by_caption(written)[0])
    plot(history, alone, images[0], maps[0], text, file)
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"plot: {file}; {wall:.0f} s, {cpu:.0f} s of CPU time")


if __name__ == "__main__":
    main()
