"""What a run ran on: versions, machine, devices, command and start, for environment.json."""

from __future__ import annotations

import ctypes
import platform
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from barlow import __version__
from barlow.cores import cores

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
        "cores": cores(),
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


def torch_version() -> str:
    """torch's version with its build (+cpu, +cu132), read from its file without the second that importing it takes."""
    found = find_spec("torch")
    try:
        words = (Path(found.origin).parent / "version.py").read_text() if found and found.origin else ""
    except OSError:
        words = ""
    named = re.search(r"^__version__ = '([^']+)'", words, re.MULTILINE)
    return named[1] if named else package_version("torch") or "not installed"


def accelerators() -> list[str]:
    """The GPUs that torch would see (CUDA's driver is asked, as torch does), by the maker's name."""
    if sys.platform == "darwin":
        return ["Apple GPU"] if platform.machine() == "arm64" else []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, names = ctypes.c_int(), []
    if "+cpu" in torch_version() or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    for number in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        if driver.cuDeviceGet(ctypes.byref(device), number) == 0 and driver.cuDeviceGetName(name, 256, device) == 0:
            names.append(name.value.decode("utf-8", "replace"))
    return names


def cpu_model() -> str:
    """The processor as the kernel names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
