"""`examples/qformer_alignment.py`: both stages learn, and its pictures are what captions say."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from support import example_programs

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.slow
def test_retrieval_rises_and_hard_negatives_help(example, tmp_path):
    log = example_programs.run(
        "qformer_alignment", "--steps", "150", "--out", str(tmp_path / "new"), folder=tmp_path
    )
    stages = {}
    for name in ("before", "first half", "random on", "hard on"):
        stages[name] = [
            float(x) for x in re.findall(r"([\d.]+)%", re.search(f"^{name} .*$", log, re.M)[0])
        ]
    before, hard, random = (stages[name] for name in ("before", "hard on", "random on"))
    assert max(before) < 10 and min(hard[:2]) > 60
    # by the matching head, of captions that differ in one word and of those that ITC likes best
    assert hard[4] > random[4] and hard[2] + hard[3] > random[2] + random[3]
    losses = re.search(
        r"([\d.]+) with its picture, ([\d.]+) with another one,\n +([\d.]+) when", log
    )
    own, other, told = map(float, losses.groups())
    assert told < own < 3.0 < other
    assert "bit for bit what they were: vision_encoder, qformer, language_model" in log
    for name in ("qformer_alignment.png", "qformer_alignment_heads.png"):
        example_programs.assert_picture(tmp_path / "new" / name)


def test_captions_and_their_numbers(example):
    content = example.every_content()
    assert len(content) == 80 and len(content.unique(dim=0)) == 80
    assert torch.equal(example.number_of(content), torch.arange(80))
    words = [example.VOCABULARY[i] for i in example.write(content[47:48])[0]]
    assert " ".join(words) == "<cls> flower with the digit one at bottom right ."


@pytest.mark.parametrize("held_out", [True, False])
def test_the_digit_is_where_the_caption_says(example, held_out):
    """Its paper is grey, which no photograph is all over a quarter."""
    content = example.every_content()
    images = example.Album(held_out).draw(content, torch.Generator().manual_seed(0))
    colour = (images.amax(1) - images.amin(1)).unflatten(2, (2, -1)).unflatten(1, (2, -1))
    grey = colour.amax((2, 4)) == 0
    expected = torch.zeros(80, 2, 2, dtype=torch.bool)
    expected[torch.arange(80), content[:, 2], content[:, 3]] = True
    assert torch.equal(grey, expected)


def test_a_frozen_parameter_that_moves_by_one_bit_is_noticed(example):
    encoder = example.Encoder()
    before = copy.deepcopy(encoder.state_dict())
    example.check_frozen("encoder", encoder, before)
    with torch.no_grad():
        bias = encoder.classify.bias
        bias[0] = torch.nextafter(bias[0], bias.new_tensor(9.0))
    with pytest.raises(AssertionError, match=r"frozen encoder has changed: classify\.bias$"):
        example.check_frozen("encoder", encoder, before)


def test_near_misses_are_the_thirteen_captions_that_differ_in_a_word(example):
    content = example.every_content()[::9]
    asked = []

    class Knowing:
        """The features of a picture are its content."""

        def match(self, features, tokens):
            asked.append(len(tokens))
            yes = (tokens == example.write(features[:, 0].long())).all(1).float()
            return torch.stack((1 - yes, yes), dim=1)[:, None]

    pool = example.Pool(content[:, None].float(), content)
    assert example.near_misses(Knowing(), pool) == 1.0
    assert set(asked) == {13}
