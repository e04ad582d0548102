"""A progress bar where tqdm is installed, else a substitute, as a GPU machine may lack it."""

from __future__ import annotations

try:
    from tqdm import tqdm as Progress
except ModuleNotFoundError:

    class Progress:
        """The methods of tqdm that the benchmarks use, without a bar."""

        def __init__(self, total: int, unit: str):
            pass

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *error) -> None:
            pass

        def update(self) -> None:
            pass

        def set_description(self, text: str) -> None:
            pass

        write = staticmethod(print)
