"""`examples/attention_collapse.py`: its mosaics are what it says, and entropy repairs."""

from __future__ import annotations

import re

import pytest
import torch

from support import example_programs

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.slow
def test_a_collapse_is_reported_and_repaired(example, tmp_path):
    log = example_programs.run(
        "attention_collapse", "--steps", "300", "--out", str(tmp_path / "new"), folder=tmp_path
    )
    assert re.search(
        r"step +\d+  blocks\.\d\.attn: attention collapses, entropy 0\.4\d+ < 0\.5", log
    )
    row = re.compile(r"^(\w+) +([\d.]+), ([\d.]+) +([\d.]+), ([\d.]+) +(\d+) +([\d.]+)%$", re.M)
    runs = {name: [*map(float, numbers)] for name, *numbers in row.findall(log)}
    assert runs.keys() == {"collapsed", "unchanged", "repaired", "normed"}
    assert max(runs["unchanged"][:2]) < 0.5 and runs["unchanged"][4] > 50
    assert min(runs["repaired"][:2]) > 1.5 and min(runs["normed"][:2]) > 1.0
    assert runs["normed"][4] == 0
    assert runs["repaired"][5] > runs["unchanged"][5] + 4
    for name in ("attention_collapse.png", "attention_collapse_maps.png"):
        example_programs.assert_picture(tmp_path / "new" / name)


@pytest.mark.parametrize("held_out", [True, False])
def test_mosaics_hold_as_many_digits_as_they_say(example, held_out):
    from sklearn.datasets import load_digits

    data = load_digits()
    number = {tuple(pixels): n for n, pixels in enumerate(data.data.tolist())}
    mosaics = example.draw_mosaics(60, held_out, torch.Generator().manual_seed(0))
    for tiles, question, count in zip(*mosaics, strict=True):
        found = [number[tuple(tile)] for tile in tiles.tolist()]
        assert {n % 5 == 0 for n in found} == {held_out}
        assert (data.target[found] == question.item()).sum() == count
    assert set(mosaics.counts.tolist()) == set(range(example.MOST + 1))
    assert set(mosaics.questions.tolist()) == set(range(10))


def test_maps_are_of_the_last_block(example):
    """Each head's weights are over all tiles, and the pixels' unit is part of the model."""
    torch.manual_seed(0)
    model = example.Counter()
    tiles, questions, _ = example.draw_mosaics(3, True, torch.Generator().manual_seed(0))
    maps = model.maps(tiles, questions)
    assert maps.shape == (3, 4, example.GRID, example.GRID)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 4))
    model.divide_by = 16.0
    assert model.maps(tiles, questions).max() < maps.max()
