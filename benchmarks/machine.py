"""What ran where: the lines that every benchmark prints above its figures, and what the data sheet promises."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

# Memory bandwidth by the vendor's data sheet, GB/s, by the name that torch reports.
DATA_SHEET_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1555.0,
    "NVIDIA A100-SXM4-80GB": 2039.0,
    "NVIDIA A100-PCIE-40GB": 1555.0,
    "NVIDIA A100 80GB PCIe": 1935.0,
    "NVIDIA GeForce RTX 3090": 936.0,
    "NVIDIA GeForce RTX 4090": 1008.0,
    "NVIDIA H100 80GB HBM3": 3350.0,
    "NVIDIA H100 NVL": 3900.0,
    "NVIDIA H100 PCIe": 2000.0,
    "NVIDIA H200": 4800.0,
    "NVIDIA H200 NVL": 4800.0,
    "NVIDIA L4": 300.0,
    "NVIDIA L40S": 864.0,
}

# Read only: nothing here changes a setting of the card.
_QUERY = {
    "driver": "driver_version",
    "sm clock": "clocks.sm",
    "memory clock": "clocks.mem",
    "highest sm clock": "clocks.max.sm",
    "highest memory clock": "clocks.max.mem",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
}


def describe(*packages: str, device: torch.device | None = None) -> dict[str, str]:
    """CPU, threads, versions, date and commit; `packages` are distributions to name besides torch; and the GPU."""
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
    facts["commit"] = _commit()
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        facts["gpu L2"] = f"{l2_bytes(device) / 2**20:.0f} MiB"
        facts["cuda"] = torch.version.cuda or (f"hip {torch.version.hip}" if torch.version.hip else "unknown")
        facts |= clocks(device)
    return facts


def clocks(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power limit and temperature as nvidia-smi reads them now; "unknown" where it does not."""
    unknown = dict.fromkeys(_QUERY, "unknown")
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return unknown
    # nvidia-smi counts all cards, torch the visible ones: the id, where torch knows it, is the same for both.
    known = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for chosen in ([] if known is None else [f"GPU-{known}"]) + [str(device.index or 0)]:
        command = ["nvidia-smi", f"--id={chosen}", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        values = [value.strip() for value in done.stdout.strip().split(",")]
        if len(values) == len(_QUERY):
            return dict(zip(_QUERY, values, strict=True))
    return unknown


def l2_bytes(device: torch.device) -> int:
    """Size of the GPU's last cache; 128 MiB, more than most have, where torch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 2**27


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on this device can have now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def data_sheet_bandwidth(device: torch.device) -> float | None:
    """GB/s by the data sheet; None if unknown."""
    if device.type != "cuda":
        return None
    return DATA_SHEET_BANDWIDTH.get(torch.cuda.get_device_name(device))


def _commit() -> str:
    """The commit of this checkout, marked if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" + changes" if changes.stdout.strip() else "")
