"""Where the checkout's folders are, and a fresh interpreter outside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, KERNELS = ROOT / "xattn_kernels", ROOT / "triton_kernels"


def python_in(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*.py")) if "__pycache__" not in f.parts]


def run_python(*arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter outside the repository, as a user would start it."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env.pop("XATTN_TRITON_ON_CPU", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=env | environment,
        cwd=ROOT.anchor,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
