"""`examples/video_resampler.py`: what it prints, and that its checks notice what they should."""

from __future__ import annotations

import re

import pytest
import torch

from support import example_programs

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def clips(example):
    return example.Album(held_out=True).clips(24, torch.Generator().manual_seed(0))


@pytest.fixture
def model(example):
    torch.manual_seed(0)
    return example.VideoModel()


@pytest.mark.slow
def test_a_short_run_learns_time(example, tmp_path):
    log = example_programs.run(
        "video_resampler", "--steps", "300", "--out", str(tmp_path / "new"), folder=tmp_path
    )
    assert "the same, bit for bit" in log and "that they have in a batch" in log
    rows = re.findall(r"^(first|last|direction|frames) .* (\d+)% +(\d+)%$", log, re.M)
    right = {name: int(all_) for name, all_, _ in rows}
    assert right.keys() == set(example.ANSWERS)
    assert right["direction"] > 80 and right["frames"] > 90
    assert right["first"] > 30 and right["last"] > 30  # chance is 10
    for part in ("", "_frames", "_lengths"):
        example_programs.assert_picture(tmp_path / "new" / f"video_resampler{part}.png")


def test_clips_are_what_their_answers_say(example, clips):
    """The digit's paper is the only square without colour, and noise is the only thing beyond."""
    assert set(clips.lengths.tolist()) <= set(range(1, example.FRAMES + 1))
    for frames, length, answers in zip(*clips, strict=True):
        colour = (frames.amax(1) - frames.amin(1))[:length]  # [length, SIDE, SIDE]
        grey = (colour == 0).unfold(1, example.DIGIT, 1).unfold(2, example.DIGIT, 1)
        columns = grey.flatten(3).all(-1).any(1).int().argmax(1)
        steps = columns.diff()
        assert answers[3] == length - 1
        if length == 1:
            assert answers[2] == example.UNKNOWN and answers[0] == answers[1]
        else:
            assert (steps > 0).all() if answers[2] else (steps < 0).all()
        assert (frames[length:].amax(1) != frames[length:].amin(1)).all()


def test_the_checks_pass_before_training(example, model, clips):
    example.check_padding(model, clips)
    example.check_alone(model, clips)


def test_padding_that_is_read_is_noticed(example, model, clips, monkeypatch):
    forward = model.resampler.forward
    monkeypatch.setattr(model.resampler, "forward", lambda x, key_lengths: forward(x))
    with pytest.raises(AssertionError, match="answer for first depends on what padding holds"):
        example.check_padding(model, clips)
    with pytest.raises(AssertionError, match=r"a clip of \d frames differs by .* alone"):
        example.check_alone(model, clips)


def test_maps_cover_the_frames_in_their_order(example, model, clips):
    maps = model.maps(*clips[:2])
    assert maps.shape == (24, 8, example.GRID, example.FRAMES * example.GRID)
    by_frame = maps.unflatten(3, (example.FRAMES, example.GRID)).sum((2, 4))
    real = torch.arange(example.FRAMES) < clips.lengths[:, None]
    assert (by_frame[real.nonzero()[:, 0], :, real.nonzero()[:, 1]] > 0).all()
    assert not by_frame.transpose(1, 2)[~real].any()
