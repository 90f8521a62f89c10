"""What ran where: the lines that every benchmark prints above its figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def describe(*packages: str) -> dict[str, str]:
    """CPU, threads and versions; `packages` are distributions to name besides torch."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    facts = {
        "cpu": models[0] if models else platform.processor() or "unknown",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in packages:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts
