"""Judges drawn calls: against eager in the same dtype and float64, and against themselves."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from fuzz.draws import Drawn
from fuzz.gated import DrawnGated
from fuzz.module import ModuleCase
from fuzz.topk import DrawnBlocks, DrawnTopK
from support.calls import Call, Tensors, assert_as_expected, build, compute_expected, run
from support.cases import Case
from support.cuda_emulation import splits_of
from xattn_kernels import KeyInterval, cross_attention, reference
from xattn_kernels.cuda_kernels import launch as cuda_launch

CALLS_PER_ROUND = 50
Judged = Drawn | DrawnGated | DrawnTopK | DrawnBlocks | ModuleCase


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, integers their largest value: what nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def splitting(n: int | None):
    """n programs share each loop; None leaves it to the launcher."""
    if n is None:
        return nullcontext()
    from xattn_kernels.triton_kernels import launch

    patches = ExitStack()
    patches.enter_context(patch.object(launch, "split_count", lambda programs, steps, device: n))
    patches.enter_context(patch.object(cuda_launch, "splits", splits_of(n)))
    return patches


@torch.no_grad()
def fill_padding(call: Call, c: Case) -> None:
    """NaN in the keys and values outside every interval of their batch element."""
    seen = call.options["mask"].dense(c.Nk).expand(c.B, c.Nq, c.Nk).any(1)
    used = (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)
    for name in call.leaves.keys() & {"k", "v"}:
        call.leaves[name].masked_fill_(~used[:, None, :, None], torch.nan)


def flipped(call: Call) -> Call:
    """The same call with its batch in the opposite order."""

    def flip(t: Tensor, dims: int) -> Tensor:
        return t.detach().flip(0).requires_grad_(t.requires_grad) if t.dim() == dims else t

    dims = {"lse": 3, "row_weight": 2}
    leaves = {n: flip(t, dims.get(n, 4)) for n, t in call.leaves.items()}
    mask = call.options.get("mask")
    if isinstance(mask, KeyInterval):
        mask = KeyInterval(flip(mask.start, 2), flip(mask.stop, 2))
    elif mask is not None:
        mask = flip(mask, 4)
    upstream = {n: t.flip(0) for n, t in call.upstream.items()}
    return replace(call, leaves=leaves, options=call.options | {"mask": mask}, upstream=upstream)


def assert_batch_is_independent(found: Tensors, call: Call, backend: str) -> None:
    """Bitwise, but for gradients that are summed over the batch."""
    for name, t in run(flipped(call), backend).items():
        summed = name == "dscale" or name == "dbias" and (t.dim() < 4 or t.shape[0] == 1)
        if not summed:
            torch.testing.assert_close(
                t.flip(0), found[name], rtol=0, atol=0, equal_nan=True, msg=f"flipped: {name}"
            )


def check(
    drawn: Judged,
    prepare: Callable[[Call], Call] = lambda call: call,
    device: str = "cpu",
) -> None:
    """Raises where the backend differs from eager by more than the tolerance rule allows."""
    if not isinstance(drawn, Drawn):
        with poisoned():
            return drawn.check(device)
    c, dtype = drawn.case, drawn.dtype
    call = build(c, dtype, device)
    if drawn.twist == "garbage":
        fill_padding(call, c)
    ours = (
        build(replace(c, mask=f"dense {c.mask}"), dtype, device) if drawn.twist == "dense" else call
    )
    with poisoned(), splitting(drawn.splits):
        found = run(prepare(ours), drawn.backend)
        if drawn.twist == "flipped":
            assert_batch_is_independent(found, prepare(call), drawn.backend)
    # PyTorch's kernels round to 16 bits more often than once: weights, each head's dk and dv
    floors = 2.0 if drawn.backend == "torch" else 1.0
    expected = compute_expected(call)
    if drawn.backend == "cuda" and "infinite" in c.values:
        settle_empty_rows(call, found, *expected[:2])
    assert_as_expected(found, expected, c, dtype, floors)


def settle_empty_rows(call: Call, *results: Tensors) -> None:
    """A row all of whose scores are -inf, by infinite keys, is to the CUDA kernels one without
    keys, whose gradient is 0; in eager and in the other kernels it is 0 times such a key."""
    if call.op is not cross_attention:
        return
    x = replace(call.in_double().inputs(), return_lse=True)
    empty = reference.cross_attention(x).lse == -torch.inf
    for found in results if empty.any() else ():
        found.pop("dscale", None)  # a sum over these rows too
        if "dq" in found:
            found["dq"] = found["dq"].masked_fill(empty[..., None], 0.0)


def first_seed(wanted: str | None) -> int:
    return int(wanted) if wanted else random.SystemRandom().randrange(2**31)


def rounds(
    where: str,
    draw_from: Callable[[int], SearchStrategy[Judged]],
    seconds: float,
    seed: int,
    judge: Callable[[Judged], None] = check,
) -> None:
    """Judges random calls until the time is over; each round has a seed, which says from what it
    draws. Prints what was judged, and `where`."""
    total: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while not total or time.monotonic() < end:
        try:
            count = one_round(draw_from(seed), seed, judge)
        except BaseException:
            print(f"fuzz: failed in the round of seed {seed}; make fuzz SEED={seed} repeats it")
            raise
        print(f"fuzz: {where}, seed {seed}: {describe(count)}", flush=True)
        total += count
        seed += 1
    print(f"fuzz: {where}, total: {describe(total)}", flush=True)


def one_round(drawn: SearchStrategy[Drawn], seed: int, judge) -> Counter[str]:
    count: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=CALLS_PER_ROUND, database=None, deadline=None,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )  # fmt: skip
    @given(drawn)
    def each(d: Drawn) -> None:
        judge(d)
        count[d.kind] += 1

    each()
    return count


def describe(count: Counter[str]) -> str:
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(count.items()))
    return f"{count.total()} calls, {kinds}"
