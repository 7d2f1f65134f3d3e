"""What a run ran on: versions, machine, devices, command and start, for environment.json."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from barlow import __version__

PACKAGES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow", "safetensors")


def environment(devices: Sequence[str] = ("cpu",), command: Sequence[str] | None = None) -> dict[str, Any]:
    """JSON-able facts. ``devices``: torch names such as ``cuda:0``; ``command``: defaults to this program's arguments.

    ``cores`` counts those this process may use; ``started`` is now, in UTC (ISO 8601).
    """
    names = [device_name(device) for device in devices]
    return {
        "barlow": __version__,
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "device": names[0],
        "devices": names,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv if command is None else command),
    }


def package_version(package: str) -> str | None:
    """The installed version without importing the package; None when it is not installed."""
    loaded = getattr(sys.modules.get(package), "__version__", None)  # torch's own also names the build (+cpu, +cu132)
    try:
        return str(loaded or version(package))
    except PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """The maker's name of a torch device; the CPU's model for ``cpu``."""
    if device.startswith("cuda"):
        import torch  # only runs on an accelerator need it here, and they have it loaded

        return torch.cuda.get_device_name(device)
    return cpu_model() if device.startswith("cpu") else device


def cpu_model() -> str:
    """The processor as the kernel names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
