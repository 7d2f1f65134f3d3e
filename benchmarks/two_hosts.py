"""Two hosts on one machine: two network namespaces with a cable (veth) between them, one process of a run in each.

    sudo python benchmarks/two_hosts.py              # the cable is pulled, and plugged in again
    sudo python benchmarks/two_hosts.py --torchrun   # the command line under torchrun, one on each host

They train together over gloo; then the cable is pulled. Both must end by themselves, with a sentence that names the
other and exit code 75. The cable is plugged in again, the same command goes on, and the curve of the whole run is that
of one process. Under torchrun both are stopped by SIGTERM, and the same command
ends the run. Needs Linux, iproute2 and
the right to make namespaces; says so where one is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from kill import bars

NAMES = tuple(f"barlow-{os.environ.setdefault('BARLOW_HOSTS', str(os.getpid()))}-{letter}" for letter in "ab")
ADDRESSES = ("10.231.0.1", "10.231.0.2")
EARLY = 8  # steps in which several processes and one are compared
PATIENCE = 12  # seconds of silence after which a process takes the other for dead


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def missing() -> str | None:
    """Why it cannot be done here; None where it can."""
    if shutil.which("ip") is None:
        return "there is no iproute2 here"
    tried = subprocess.run(["ip", "netns", "add", "barlow-try"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed here ({tried.stderr.strip()})"
    ip("netns", "del", "barlow-try")
    return None


def connect() -> None:
    """Two namespaces and a cable between them."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("link", "add", "veth0", "netns", NAMES[0], "type", "veth", "peer", "name", "veth0", "netns", NAMES[1])
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
        ip("-n", name, "link", "set", "veth0", "up")
        ip("-n", name, "link", "set", "lo", "up")


def disconnect() -> None:
    """Removes what ``connect`` made."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def settings(folder: Path, out: str, steps: int) -> dict[str, Any]:
    return {
        "images": str(folder / "images.npy"), "out": str(folder / out), "encoder": "resnetv2_18",
        "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}, "image_size": 32,
        "projector": (32, 32), "lambda_": 0.02, "batch_size": 32, "steps": steps, "held_out": 16, "workers": 0,
        "precision": "float32", "optimizer": "adamw", "lr": 2e-4, "seed": 1, "checkpoint_every": 4,
        "health_every": 1000, "timeout": f"{PATIENCE}s",
    }  # fmt: skip


def host(number: int, world: int, given: dict[str, Any], folder: Path) -> None:
    """One host: moves into its namespace, trains as torchrun would let it, and leaves its ending in a file."""
    if world > 1:
        handle = os.open(f"/run/netns/{NAMES[number]}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ |= {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "1",
                   "GROUP_RANK": str(number), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}  # fmt: skip
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "veth0"
    import torch

    from barlow import Config, pretrain
    from barlow.errors import Stopped

    torch.set_num_threads(1)
    ending: list[Any] = [0, ""]
    try:
        pretrain(Config(**given), quiet=True)
    except SystemExit as quietly:
        ending = [quietly.code, ""]
    except Stopped as error:
        ending = [error.exit_code, str(error)]
    (folder / f"ending-{number}.json").write_text(json.dumps(ending))


def start(world: int, given: dict[str, Any], folder: Path) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["barlow.run"])
    processes = [context.Process(target=host, args=(number, world, given, folder)) for number in range(world)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[Any], folder: Path, seconds: float) -> list[list[Any]]:
    """(exit code, sentence) of each; of one that had to be killed, or ended otherwise, its exit code and nothing."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    endings = []
    for number, process in enumerate(processes):
        file = folder / f"ending-{number}.json"
        endings.append(json.loads(file.read_text()) if file.exists() else [process.exitcode, ""])
        file.unlink(missing_ok=True)
    return endings


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def apart(run: Path, alone: Path) -> float:
    """The largest relative difference of the losses in the first ``EARLY`` steps; later, rounding has grown."""
    a, b = (np.array(losses(path)[:EARLY]) for path in (run, alone))
    return float(np.max(np.abs(a / b - 1)))


def cut_and_resume(folder: Path, steps: int = 60, patience: float = 300.0) -> dict[str, Any]:
    """Trains on two hosts, pulls the cable, plugs it in, resumes; returns how each process ended and the curves."""
    np.save(folder / "images.npy", bars(96))
    run = folder / "run"
    connect()
    try:
        processes = start(2, settings(folder, "run", steps), folder)
        until = time.monotonic() + patience
        while time.monotonic() < until and not (run / "checkpoints" / "latest").exists():
            time.sleep(0.05)
        ip("-n", NAMES[1], "link", "set", "veth0", "down")
        cut = time.monotonic()
        ended = end(processes, folder, patience)
        seconds = time.monotonic() - cut
        at = len(losses(run))
        ip("-n", NAMES[1], "link", "set", "veth0", "up")
        processes = start(2, settings(folder, "run", steps), folder)
        resumed = end(processes, folder, patience)
    finally:
        disconnect()
    end(start(1, settings(folder, "alone", steps), folder), folder, patience)
    off = apart(run, folder / "alone")
    return {"ended": ended, "seconds": seconds, "at": at, "resumed": resumed, "steps": len(losses(run)), "off": off}


def torchrun(folder: Path, until: Path | None = None) -> list[int]:
    """The command line under torchrun on both hosts; each is asked to stop as soon as there is a file ``until``.

    The exit code of each torchrun.
    """
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29512"]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    run = ["-m", "barlow", "pretrain", "--config", str(folder / "run.toml")]
    there = {**os.environ, "GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(["ip", "netns", "exec", name, *command, "--node-rank", str(number), *run], env=there)
        for number, name in enumerate(NAMES)
    ]
    while until and not until.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    if until:
        for process in processes:
            process.terminate()
    return [process.wait(600) for process in processes]


def under_torchrun(folder: Path, steps: int = 60) -> dict[str, Any]:
    """Trains under torchrun on two hosts; is stopped by SIGTERM after a checkpoint, and repeated. Beside one alone."""
    from barlow import Config
    from barlow.config import to_toml

    np.save(folder / "images.npy", bars(96))
    (folder / "run.toml").write_text(to_toml(Config(**settings(folder, "run", steps))))
    connect()
    try:
        stopped = torchrun(folder, until=folder / "run" / "checkpoints" / "latest")
        at = len(losses(folder / "run"))
        done = torchrun(folder)
    finally:
        disconnect()
    end(start(1, settings(folder, "alone", steps), folder), folder, 300)
    off = apart(folder / "run", folder / "alone")
    return {"stopped": stopped, "at": at, "done": done, "steps": len(losses(folder / "run")), "off": off}


def main() -> None:
    """Prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torchrun", action="store_true")
    under = parser.parse_args().torchrun
    why = missing()
    if why:
        raise SystemExit(f"skipped: {why}")
    if under:
        with tempfile.TemporaryDirectory() as folder:
            found = under_torchrun(Path(folder))
        print(f"torchrun on two hosts: exit codes {found['stopped']} after SIGTERM, at step {found['at']};")
        print(f"the same command again: exit codes {found['done']}, {found['steps']} steps in all")
        print(f"the first {EARLY} losses beside those of one process: at most {found['off']:.1e} apart")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = cut_and_resume(Path(folder))
    print(f"cut after step {found['at']}; both ended within {found['seconds']:.1f} s of it:")
    for number, (code, sentence) in enumerate(found["ended"]):
        print(f"  host {number}: exit code {code}: {sentence}")
    print(f"the same command again: exit codes {[code for code, _ in found['resumed']]}, {found['steps']} steps in all")
    print(f"the first {EARLY} losses beside those of one process: at most {found['off']:.1e} apart")


if __name__ == "__main__":
    main()
