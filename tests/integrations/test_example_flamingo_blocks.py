"""`examples/flamingo_blocks.py`: it runs, and its checks notice what they should."""

from __future__ import annotations

import re

import pytest
import torch

from support import example_programs

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def album(example):
    return example.Album(held_out=True)


@pytest.fixture
def seeing(example, album):
    """(model, a copy of its language model, documents), nothing of it trained."""
    torch.manual_seed(0)
    before, lm = (example.LanguageModel().eval() for _ in range(2))
    lm.load_state_dict(before.state_dict())
    documents = album.documents(2, torch.Generator().manual_seed(0))
    return example.SeeingModel(lm), before, documents


@pytest.mark.slow
def test_a_short_run_opens_the_gates_and_lowers_the_loss(example, tmp_path):
    log = example_programs.run(
        "flamingo_blocks", "--steps", "40", "--out", str(tmp_path / "new"), folder=tmp_path
    )
    assert log.count("bit for bit") == 3
    steps = re.findall(r"^step +(\d+) .* held out (\S+)  gates (.*)$", log, re.MULTILINE)
    gates = [[float(gate) for gate in found.split()] for _, _, found in steps]
    assert int(steps[0][0]) == 0 and int(steps[-1][0]) == 40
    assert gates[0] == [0] * 4 and max(map(abs, gates[-1])) > 0.1
    alone = float(re.search(r"language only, held out: (\S+)", log)[1])
    first, last = float(steps[0][1]), float(steps[-1][1])
    assert first == alone and last < 0.95 * alone
    assert log.count("  written <image> ") == 3
    example_programs.assert_picture(tmp_path / "new" / "flamingo_blocks.png")


def test_the_checks_pass_before_training(example, seeing):
    model, before, documents = seeing
    example.check_frozen(model.lm, before, documents[0])
    example.check_closed(model, before, documents)


def test_a_frozen_parameter_that_moves_by_one_bit_is_noticed(example, seeing):
    model, before, (tokens, _) = seeing
    weight = model.lm.layers[2].linear1.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], weight.new_tensor(9.0))
    with pytest.raises(AssertionError, match=r"changed: layers\.2\.linear1\.weight$"):
        example.check_frozen(model.lm, before, tokens)


def test_frozen_parameters_with_other_outputs_are_noticed(example, seeing):
    model, before, (tokens, _) = seeing
    model.lm.layers[3].register_forward_hook(lambda *call: call[-1] + 1e-3)
    with pytest.raises(AssertionError, match="other logits"):
        example.check_frozen(model.lm, before, tokens)


def test_a_closed_block_that_lets_something_through_is_noticed(example, seeing):
    model, before, documents = seeing
    model.blocks[1].register_forward_hook(lambda *call: call[-1] + 1e-3)
    with pytest.raises(AssertionError, match="not those of the language model"):
        example.check_closed(model, before, documents)


def test_open_gates_change_the_outputs_and_closing_them_restores_these(example, seeing):
    model, before, documents = seeing
    with torch.no_grad():
        model.blocks[0].attn_gate.fill_(0.5)
        assert not torch.equal(model(*documents), before(documents[0]))
    with pytest.raises(AssertionError, match="gates are not 0"):
        example.check_closed(model, before, documents)
    example.check_closed(example.closed(model), before, documents)
    assert model.blocks[0].attn_gate.item() == 0.5


def test_captions_say_where_the_digit_is(example, album):
    """A digit is grey and a photograph is not, so the grey corner is the one that is named."""
    tokens, images = album.documents(16, torch.Generator().manual_seed(0))
    colour = images.amax(2) - images.amin(2)
    corners = colour.flatten(0, 1).unflatten(2, (2, -1)).unflatten(1, (2, -1)).amax((2, 4))
    for caption, corner in zip(example.by_caption(tokens).flatten(0, 1), corners, strict=True):
        words = example.read(caption).split()
        row, column = (
            example.KINDS["row"].index(words[-3]),
            example.KINDS["column"].index(words[-2]),
        )
        assert corner.flatten().argmin() == 2 * row + column and corner[row, column] == 0


def test_captions_with_cached_patches_are_those_without(example, seeing):
    model, _, (_, images) = seeing
    with torch.no_grad():
        for block in model.blocks:
            block.attn_gate.fill_(1.0)
        written = example.captions(model, images)
        again = model(written, images).argmax(-1)[:, :-1]
    here = example.image_here(written)[:, 1:]
    assert torch.equal(again[~here], written[:, 1:][~here])
