"""What `calls.py` does before any kernel runs."""

import pytest
import torch

from support.calls import build
from support.cases import BY_NAME


def test_a_gpu_without_room_for_tensors_far_apart_skips(monkeypatch):
    """Four of them, in each of which the last of 4 heads ends 4 * 2^31 elements after the first."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 2**40))
    case = BY_NAME["layout_far_apart_long"]
    with pytest.raises(
        pytest.skip.Exception, match=r"needs \d+\.\d GiB .*, 20\.0 are free"
    ) as said:
        build(case, torch.bfloat16, "cuda")
    needed = float(said.value.msg.split()[1])
    # q and dout have 4 heads, k and v 2; each head and the gap after it are 2^31 elements or more
    assert 4 * (4 + 4 + 2 + 2) <= needed <= 1.1 * 4 * (4 + 4 + 2 + 2) + 1
