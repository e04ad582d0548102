"""The Triton kernels that torch.compile generates for FlexAttention, without a GPU.

FlexAttention with a "last image" document mask is traced, forward and backward, on fake CPU
tensors; the two graphs are moved to a CUDA device that exists in name only, and Inductor lowers
them with the configuration that torch chooses for that device by default. The result is the source
that a user's torch.compile writes, rendered here from the installed torch; none of it is kept in
this repository. The kernels process masked (partial) and unmasked (full) tiles in separate loops,
and the backward is one kernel, in which some programs compute dq and others dk and dv.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

B, H, NQ, NK, BLOCK = 2, 8, 2048, 4096, 128
TOKENS_PER_IMAGE = 64
MULTIPROCESSORS = {80: 108, 90: 132}
KERNEL_TEXT = re.compile(r"async_compile\.triton\('(triton_tem\w+)', '''(.*?)''', device_str", re.S)


def training_graphs(D: int) -> list[fx.GraphModule]:
    """The graphs of FlexAttention's forward and backward, on fake CPU tensors."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch.nn.attention import flex_attention as flex

    graphs = []

    def keep(graph: fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():
        q = torch.empty(B, H, NQ, D, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(B, H, NK, D, dtype=q.dtype, requires_grad=True) for _ in range(2))
        image = torch.empty(B, NQ, dtype=torch.int32)
        counts = torch.empty(B, 1, NQ // BLOCK, dtype=torch.int32)
        indices = torch.empty(B, 1, NQ // BLOCK, NK // BLOCK, dtype=torch.int32)
        mask = flex.BlockMask.from_kv_blocks(
            counts, indices, counts.clone(), indices.clone(), BLOCK_SIZE=BLOCK,
            mask_mod=lambda b, h, i, j: image[b, i] == j // TOKENS_PER_IMAGE,
            seq_lengths=(NQ, NK),
        )  # fmt: skip
        backend = aot_autograd(
            fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table()
        )
        torch._dynamo.reset()
        attention = torch.compile(flex.flex_attention, backend=backend, dynamic=False)
        # a CPU's FlexAttention has no backward; none of it runs here
        with mock.patch.object(flex, "_validate_device", lambda *_: None):
            attention(q, k, v, block_mask=mask).sum().backward()
    return graphs


def move_to_cuda(graph: fx.GraphModule, mode: FakeTensorMode) -> list[Tensor]:
    """The inputs of the graph, after it was rewritten for CUDA tensors."""

    def move(t: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    for part in graph.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.nodes:
            if "val" in node.meta:
                values = node.meta["val"]
                node.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, move, values)
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            for options in (a for a in node.args if isinstance(a, dict)):
                if "OUTPUT_LOGSUMEXP" in options:  # False on a CPU, which does not train
                    node.args = tuple(
                        {**a, "OUTPUT_LOGSUMEXP": True} if a is options else a for a in node.args
                    )
        part.recompile()
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


@contextlib.contextmanager
def pretended_device(arch: int) -> Iterator[None]:
    """A context in which Inductor finds one CUDA device of this architecture."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler

    properties = SimpleNamespace(
        major=arch // 10, minor=arch % 10, warp_size=32, regs_per_multiprocessor=65536,
        multi_processor_count=MULTIPROCESSORS[arch], max_threads_per_multi_processor=2048,
        name=f"sm_{arch}", gcnArchName="",
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (arch // 10, arch % 10), "get_device_properties": properties,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:

        def patch(owner, name: str, answer) -> None:
            stack.enter_context(mock.patch.object(owner, name, answer))

        for name, value in answers.items():
            patch(torch.cuda, name, lambda *_, value=value: value)
        for interface in (CudaInterface, CudaInterface.Worker):
            patch(interface, "get_device_properties", staticmethod(lambda *_: properties))
        patch(CudaInterface, "get_compute_capability", staticmethod(lambda *_: arch))
        patch(CudaInterface, "is_available", staticmethod(lambda: True))
        patch(scheduler, "has_triton", lambda: True)
        yield


def generated_code(graph: fx.GraphModule, arch: int) -> str:
    """The source that Inductor writes for the graph."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = FakeTensorMode()
    inputs = move_to_cuda(graph, mode)
    with pretended_device(arch):
        lowering = GraphLowering(graph, example_inputs=inputs)
        with DebugContext(), V.set_graph_handler(lowering), V.set_fake_mode(mode):
            lowering.run(*inputs)
            return lowering.codegen()[0].value


def attention_kernel(code: str, folder: Path) -> tuple:
    """(kernel, its pointers' dtypes, options, constants) of the one template in generated code."""
    from torch._inductor.runtime import triton_heuristics

    ((name, text),) = KERNEL_TEXT.findall(code)
    path, decoration = folder / f"{name}.py", {}
    path.write_text(text)

    def template(**options):
        decoration.update(options)
        return lambda kernel: kernel

    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(triton_heuristics, "template", template):
        spec.loader.exec_module(module)
    options = {option: decoration[option] for option in ("num_warps", "num_stages")}
    signature = decoration["triton_meta"]["signature"].values()
    return getattr(module, name), signature, options, decoration["inductor_meta"]["config_args"]


def compile_kernels(arch: int, D: int) -> list[tuple]:
    """(constants, compiled kernel, options, log) of the forward and of the backward."""
    from ..triton_grid import compile_only

    dtypes = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "*i32": torch.int32}
    kernels = []
    with compile_only(arch) as compiled, tempfile.TemporaryDirectory() as folder:
        for graph in training_graphs(D):
            code = generated_code(graph, arch)
            kernel, signature, options, constants = attention_kernel(code, Path(folder))
            pointers = [torch.empty(1, dtype=dtypes[t], device="meta") for t in signature]
            kernel[(1,)](*pointers, **options)
            kernels.append((constants, *compiled[-1][1:]))
    return kernels
