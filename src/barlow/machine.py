"""What there is to compute with: the device, how many of them, the cores, and whether bfloat16 pays here."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

import torch

from barlow.cores import cores, threads

PAYS = 1.1  # times as fast as float32, for bfloat16 to be worth its rounding


def machine() -> tuple[str, int, int, bool]:
    """(device, number of devices, cores, whether bfloat16 pays) of this machine."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count(), cores(), torch.cuda.get_device_capability()[0] >= 8
    if torch.backends.mps.is_available():
        return "mps", 1, cores(), False
    return "cpu", 1, cores(), _bfloat16_pays()


@lru_cache(maxsize=1)
def _bfloat16_pays() -> bool:
    """Whether bfloat16 is faster on this processor, told from a convolution: some have it and lose by it.

    Measured in the time of this thread alone, so that other work on the machine does not decide.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    if not {"avx512_bf16", "amx_bf16"} & set(flags):
        return False  # torch would convert back and forth
    with threads(1):
        return _convolution_seconds(torch.float32) > PAYS * _convolution_seconds(torch.bfloat16)


def _convolution_seconds(dtype: torch.dtype) -> float:
    image, kernel = torch.ones(16, 64, 14, 14, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
    image, kernel = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (image, kernel))
    times = []
    for _ in range(4):
        begun = time.thread_time()
        torch.autograd.grad(torch.nn.functional.conv2d(image, kernel, padding=1).sum(), (image, kernel))
        times.append(time.thread_time() - begun)
    return min(times)
