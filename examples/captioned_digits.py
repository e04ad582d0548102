"""Pictures of a handwritten digit on a photograph, and their 80 captions.

A picture is a crop of one of scikit-learn's two sample photographs with a digit in one of its
corners; its content consists of four choices: photograph, digit, row, column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

CAPTION = "{photo} with the digit {digit} at {row} {column} ."
KINDS = {
    "photo": ["china", "flower"],
    "digit": "zero one two three four five six seven eight nine".split(),
    "row": ["top", "bottom"],
    "column": ["left", "right"],
}
SPECIAL = ["<cls>", "<dec>"]
VOCABULARY = SPECIAL + [w for w in CAPTION.split() if "{" not in w]
VOCABULARY += [word for words in KINDS.values() for word in words]
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
SLOTS = [1 + CAPTION.split().index(f"{{{kind}}}") for kind in KINDS]
FIRST = torch.tensor([TOKEN[words[0]] for words in KINDS.values()])  # the first word of each kind
LENGTH = 1 + len(CAPTION.split())
SIDE = 32  # pixels along each side of a picture


def write(content: Tensor, start: str = "<cls>") -> Tensor:
    """The tokens [n, LENGTH] of captions, from the number [n, 4] of the word of each kind."""
    words = [start, *(w if w in TOKEN else start for w in CAPTION.split())]
    tokens = torch.tensor([TOKEN[word] for word in words]).repeat(len(content), 1)
    tokens[:, SLOTS] = FIRST + content
    return tokens


def every_content() -> Tensor:
    """The contents of all captions, [80, 4]."""
    return torch.cartesian_prod(*(torch.arange(len(words)) for words in KINDS.values()))


def number_of(content: Tensor) -> Tensor:
    """The index of each content in `every_content`, [n]."""
    number = torch.zeros(len(content), dtype=torch.long)
    for which, words in zip(content.unbind(1), KINDS.values(), strict=True):
        number = number * len(words) + which
    return number


class Album:
    """The pictures of one split, with digits and crops that the other split does not have."""

    def __init__(self, held_out: bool) -> None:
        data = load_digits()
        chosen = (torch.arange(len(data.images)) % 5 == 0) == held_out
        paper = 1 - torch.from_numpy(data.images).float()[chosen] / 16
        labels = torch.from_numpy(data.target)[chosen]
        self.digits = F.interpolate(paper[:, None], (SIDE // 2, SIDE // 2), mode="bilinear")
        self.by_class = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
        self.photographs = []
        for photo in load_sample_images().images:
            pixels = torch.tensor(photo).permute(2, 0, 1)[None] / 255
            small = F.interpolate(pixels, scale_factor=0.4, mode="area")[0]
            left, middle, right = small.tensor_split([102, 154], dim=2)  # of 256
            self.photographs.append([middle] if held_out else [left, right])

    def draw(self, content: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [n, 3, SIDE, SIDE] in [-1, 1], one for each content."""
        images, half = [], SIDE // 2
        random = torch.rand(len(content), 4, generator=generator).tolist()
        for (photo, digit, row, column), (part, which, y, x) in zip(
            content.tolist(), random, strict=True
        ):
            parts, candidates = self.photographs[photo], self.by_class[digit]
            pixels = parts[int(part * len(parts))]
            top, left = int(y * (pixels.shape[1] - SIDE)), int(x * (pixels.shape[2] - SIDE))
            image = pixels[:, top : top + SIDE, left : left + SIDE].clone()
            rows, columns = (slice(half * n, half * (n + 1)) for n in (row, column))
            image[:, rows, columns] = self.digits[candidates[int(which * len(candidates))]]
            images.append(image)
        return torch.stack(images) * 2 - 1


def some_content(n: int, generator: torch.Generator) -> Tensor:
    """Random contents, [n, 4]."""
    return every_content()[torch.randint(80, (n,), generator=generator)]


def picture_features(dim: int) -> nn.Sequential:
    """Convolutions of pictures [B, 3, n, n] to features [B, dim, n / 4, n / 4]."""
    return nn.Sequential(
        nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(dim, dim, 3, padding=1),
    )
