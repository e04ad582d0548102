"""The machine of a measurement: device, versions, commit, date, and free memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@lru_cache(None)
def commit() -> str:
    """The commit of this checkout, "unknown" without git.

    `-dirty` is added when tracked files other than results of earlier runs differ from it.
    """

    def git(*words: str) -> str:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        return subprocess.run(["git", *words], **options).stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device | str) -> str:
    """`NVIDIA H200`, or a processor's name with the threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = re.sub(r"\((R|TM)\)| CPU| Processor|@.*", "", model[1]).strip() if model else name
    threads = torch.get_num_threads()
    return f"{name} {threads} thread{'s' * (threads > 1)}"


def slug(device: torch.device | str) -> str:
    """The device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def provenance(device: torch.device | str) -> dict[str, str]:
    """The fields that every saved row carries."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }


def free_memory(device: torch.device) -> int:
    """The bytes that new tensors may take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except OSError:  # not Linux: the memory that is installed
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
