"""A progress bar, where tqdm is installed; `make gpu` has to do without what the machine lacks."""

from __future__ import annotations

try:
    from tqdm import tqdm as Progress
except ModuleNotFoundError:

    class Progress:
        """As much of tqdm as is used here, without a bar."""

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
