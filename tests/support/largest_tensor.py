"""How big a tensor some code makes: the test that a score matrix never exists."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """`nbytes` of the largest memory that any operator's result needs, forward and backward.

    A view counts as its own size, so an expanded tensor costs nothing.
    """

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                own = x.numel() * x.element_size()
                self.nbytes = max(self.nbytes, min(x.untyped_storage().nbytes(), own))
        return result
