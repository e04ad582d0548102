"""Pictures: what is drawn is what was given, and no display is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

import numpy as np
from matplotlib.collections import PolyCollection
from PIL import Image

from xattn_kernels import (
    GatedCrossAttentionBlock,
    KeyInterval,
    StabilityMonitor,
    Thresholds,
    masks,
    viz,
)

IMAGE, WORDS = torch.rand(3, 8, 12), ["a", "red", "roof"]
PICTURE = Image.fromarray((IMAGE.permute(1, 2, 0) * 255).to(torch.uint8).numpy())
MAPS = torch.arange(3 * 2 * 3.0).view(3, 2, 3) / 20


def drawn(axes, n: int = -1) -> np.ndarray:
    """The n-th picture on the axes, as numbers."""
    return np.asarray(axes.images[n].get_array())


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_an_overlay_draws_every_map_over_the_whole_image():
    figure = viz.attention_overlay(IMAGE, MAPS, WORDS)
    picture, *words = figure.axes
    assert np.allclose(drawn(picture), IMAGE.permute(1, 2, 0))
    for axes, word, weights in zip(words, WORDS, MAPS, strict=True):
        assert axes.get_title() == f"{word}\nmax {weights.max():.2g}"
        grey, heat = axes.images
        assert np.allclose(drawn(axes), weights) and np.ptp(drawn(axes, 0)) > 0
        assert tuple(grey.get_extent()) == tuple(heat.get_extent()) == (0, 12, 8, 0)
        assert heat.get_clim() == (0, weights.max().item())
        opacity = heat.get_alpha()
        assert opacity.shape == (2, 3) and opacity.argmax() == weights.argmax()
    assert len(words) == 3


def test_one_scale_of_colours_for_all_words():
    *panels, bar = viz.attention_overlay(IMAGE, MAPS, WORDS, shared_scale=True, columns=2).axes
    assert {axes.images[-1].get_clim() for axes in panels[1:4]} == {(0, MAPS.max().item())}
    assert bar.get_ylabel() == "attention"


@pytest.mark.parametrize(
    "image",
    [IMAGE[0], IMAGE.permute(1, 2, 0), (IMAGE * 255).to(torch.uint8), IMAGE.numpy(), PICTURE],
)
def test_images_of_every_layout(image):
    seen = drawn(viz.attention_overlay(image, MAPS, WORDS).axes[0])
    expected = IMAGE[0] if seen.ndim == 2 else IMAGE.permute(1, 2, 0)
    assert np.allclose(seen, expected, atol=1 / 255)


def test_maps_of_nothing_are_drawn():
    """A word that sees no image has weights of 0, and one map is no list of maps of none."""
    viz.attention_overlay(IMAGE, torch.zeros(1, 2, 2, dtype=torch.bfloat16), ["a"])


def test_a_heat_map_names_its_sides():
    weights = torch.rand(3, 100, requires_grad=True)
    figure = viz.attention_heatmap(weights, queries=WORDS, keys=[f"V{i}" for i in range(100)])
    axes = figure.axes[0]
    assert np.allclose(drawn(axes), weights.detach())
    assert [text.get_text() for text in axes.get_yticklabels()] == WORDS
    names = {t: text.get_text() for t, text in zip(axes.get_xticks(), axes.get_xticklabels())}  # noqa: B905
    assert 10 < len(names) <= 40 and all(name == f"V{place}" for place, name in names.items())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            GatedCrossAttentionBlock(dim=16, dim_head=8, heads=2) for _ in range(2)
        )

    def forward(self, text, media):
        return self.two(self.one(text, media), media).square().mean()


@pytest.fixture
def monitor() -> StabilityMonitor:
    torch.manual_seed(0)
    model = Model()
    watching = StabilityMonitor(model, every=2, thresholds=Thresholds(entropy=1.5))
    for _ in range(5):
        loss = model(torch.randn(2, 4, 16), torch.randn(2, 1, 6, 16))
        loss.backward()
        watching.step(loss)
    watching.close()
    return watching


def test_a_history_has_a_line_for_each_layer_and_the_threshold(monitor):
    entropy, gates, norms = viz.history(monitor, ("entropy", "gates", "grad_norm")).axes
    found = lines(entropy)
    assert found.keys() == {"one.attn", "two.attn", "threshold 1.5"}
    assert np.allclose(found["one.attn"], monitor.history["attention/one.attn/entropy"])
    assert found["threshold 1.5"][0, 1] == 1.5
    assert lines(gates).keys() == {
        f"{block}.{gate}" for block in ("one", "two") for gate in ("attn_gate", "ff_gate")
    }
    assert lines(norms).keys() == {"total", "cross_attention", "threshold 100"}
    assert norms.get_yscale() == "log" and entropy.get_yscale() == "linear"


def test_histories_of_two_runs_and_of_a_mapping(monitor):
    (axes,) = viz.history({"before": monitor, "after": monitor}, "entropy").axes
    assert {"before: one.attn", "after: two.attn", "threshold 1.5"} < lines(axes).keys()
    later = {"attention/a/entropy": [(5, 1.0)]}
    (axes,) = viz.history({"before": monitor, "after": later}, "entropy").axes
    assert lines(axes)["after: a"].tolist() == [[5, 1]]
    (axes,) = viz.history({"loss": [(0, 3.0), (10, 2.0)]}, "loss").axes
    assert np.allclose(lines(axes)["loss"], [[0, 3], [10, 2]])
    ratios = {"features/a/scale_ratio": [(0, 3.0)]}
    (axes,) = viz.history(ratios, "scale_ratio", thresholds=Thresholds()).axes
    assert lines(axes).keys() == {"a", "threshold 0.1", "threshold 10"}


def bars(axes) -> list[tuple]:
    """(row, start, stop) of every bar."""
    (bars_of_mask,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    corners = [path.vertices for path in bars_of_mask.get_paths()]
    return [
        (round(c[:, 1].mean(), 6), c[:, 0].min(), c[:, 0].max()) for c in (v[:4] for v in corners)
    ]


def test_a_mask_is_drawn_interval_by_interval():
    here = torch.tensor([[True, False, True, False], [False, True, False, False]])
    mask = masks.media(here, tokens_per_media=5, n_media=2)
    figure = viz.mask_picture(mask, 10, batch=1, blocks=["one", "two"], queries=list("abcd"))
    (axes,) = figure.axes
    # the first word sees no image
    assert bars(axes) == [(1, 0, 5), (2, 0, 5), (3, 0, 5)]
    assert axes.get_title().startswith("37.5% of") and axes.get_xlim() == (0, 10)
    assert [text.get_text() for text in axes.texts] == ["one", "two"]
    assert bars(viz.mask_picture(mask, 10).axes[0]) == [
        (0, 0, 5),
        (1, 0, 5),
        (2, 5, 10),
        (3, 5, 10),
    ]


def test_masks_that_broadcast_and_that_reach_too_far():
    shared = masks.padding(torch.tensor([3, 7]))
    assert bars(viz.mask_picture(shared, 10, batch=1).axes[0]) == [(0, 0, 7)]
    ends = torch.tensor([3, 99], dtype=torch.int32)
    assert bars(viz.mask_picture(KeyInterval(ends * 0 - 4, ends), 10).axes[0]) == [
        (0, 0, 3),
        (1, 0, 10),
    ]


def test_errors_by_the_share_that_is_kept():
    curves = {"keys": [(0.5, 0.01), (0.1, 0.2), (1.0, 0.0)], "blocks": [(0.1, 0.4), (0.5, 0.1)]}
    (axes,) = viz.sparsity_error(curves, ylabel="error of out").axes
    assert np.allclose(lines(axes)["keys"], [[0.1, 0.2], [0.5, 0.01]])
    assert np.allclose(lines(axes)["blocks"], curves["blocks"])
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_ylabel() == "error of out"


def test_figures_are_written_without_a_display_and_without_pyplot(tmp_path):
    """In a process of its own: other tests import pyplot."""
    program = (
        "import sys, torch\n"
        "import xattn_kernels\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from xattn_kernels import masks, viz\n"
        "mask = masks.causal(4, 6)\n"
        "viz.mask_picture(mask, 6).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    file = tmp_path / "mask.png"
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


MASK = masks.causal(4, 6)
OVERLAY = viz.attention_overlay
WRONG = {
    r"image must be \[H, W\], ": lambda: OVERLAY(IMAGE[None], MAPS, WORDS),
    "image must be bytes or from 0 to 1": lambda: OVERLAY(IMAGE * 255, MAPS, WORDS),
    r"maps must be \[R, h, w\]": lambda: OVERLAY(IMAGE, MAPS[0], WORDS),
    "maps must be finite": lambda: OVERLAY(IMAGE, MAPS / 0, WORDS),
    "maps must be a tensor or an array": lambda: OVERLAY(IMAGE, "maps", WORDS),
    "words must be as many as the maps, 3, got 1": lambda: OVERLAY(IMAGE, MAPS, ["a"]),
    "words must be a sequence of strings, got str": lambda: OVERLAY(IMAGE, MAPS, "abc"),
    "width must be a positive number, got 0": lambda: OVERLAY(IMAGE, MAPS, WORDS, width=0),
    "columns must be at least 1, got 0": lambda: OVERLAY(IMAGE, MAPS, WORDS, columns=0),
    "weights must be finite and at least 0": lambda: viz.attention_heatmap(-torch.ones(2, 3)),
    "keys must be as many as the columns of weights, 3": lambda: viz.attention_heatmap(
        torch.ones(2, 3), keys=["a"]
    ),
    r"statistics must be among \['loss'\], got 'entropy'": lambda: viz.history(
        {"loss": [(0, 1.0)]}, "entropy"
    ),
    "seen must be a StabilityMonitor or a mapping, got list": lambda: viz.history([]),
    r"seen\['b'\] must be a monitor or a history, got float": lambda: viz.history(
        {"a": {}, "b": 1.0}
    ),
    r"seen\['loss'\] must be \(x, y\) pairs": lambda: viz.history({"loss": []}, "loss"),
    "thresholds must be Thresholds or None, got float": lambda: viz.history(
        {"loss": [(0, 1.0)]}, "loss", thresholds=0.5
    ),
    "mask must be a KeyInterval, got a torch.bool tensor": lambda: viz.mask_picture(
        MASK.dense(6), 6
    ),
    "Nk must be at least 1, got 0": lambda: viz.mask_picture(MASK, 0),
    "batch must be from 0 to 0, got 1": lambda: viz.mask_picture(MASK, 6, batch=1),
    "statistics must be of something seen, which is nothing": lambda: viz.history({}, "entropy"),
    "statistics must name one at least": lambda: viz.history({"loss": [(0, 1.0)]}, []),
    r"curves\['a'\] must be \(x, y\) pairs": lambda: viz.sparsity_error({"a": [(1.0, 0.1), (1,)]}),
    r"curves\['a'\] must have errors of": lambda: viz.sparsity_error({"a": [(0.5, -0.1)]}),
    "curves must map methods to pairs": lambda: viz.sparsity_error([(1, 2)]),
    r"curves\['a'\] must have shares over 0": lambda: viz.sparsity_error({"a": [(2.0, 0.1)]}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
