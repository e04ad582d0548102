"""What the tests of the examples share: a program as a module, and a run as users run it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.modes import CHOICES

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module; skips where what it needs is not installed."""
    for package in ("sklearn", "PIL", "matplotlib"):
        pytest.importorskip(package, reason=f"the example needs {package}")
    if str(FOLDER) not in sys.path:  # as Python does for a program
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its named tuples look for their types
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str, folder: Path) -> str:
    """What it prints, called in `folder`; fails with it where it fails."""
    environment = {n: v for n, v in os.environ.items() if n not in CHOICES}
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments],
        env=environment | {"PYTHONPATH": str(FOLDER.parent)},
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_picture(file: Path) -> None:
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
