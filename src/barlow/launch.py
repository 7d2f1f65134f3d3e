"""The processes of a run, one a device: started here, or recognised where torchrun or SLURM started them."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy

from barlow import ranks
from barlow.config import Config
from barlow.console import say
from barlow.cores import cores
from barlow.errors import Stopped, UserError
from barlow.kinds import parse_duration
from barlow.machine import machine
from barlow.resources import freed_memory_kept

TIMEOUT = 900.0  # seconds that one process waits for another, unless the settings say otherwise
GRACE = 10.0  # seconds that the processes which this one started have to end by themselves
CALL = "BARLOW_CALL"  # of the environment: the call in its program that a process which we start is for
TOLD = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")  # by us to those we start
_calls = 0  # of ``pretrain`` in this process


def launch(config: Config, stack: ExitStack) -> Fabric:
    """Fabric on the devices of this run. What is started here ends with ``stack``. Raises UserError."""
    device, count, _, _ = machine()
    stack.callback(torch.set_num_threads, torch.get_num_threads())  # the program around this run has its own wishes
    if device == "cpu":
        stack.enter_context(freed_memory_kept())
    if config.precision == "float16" and device != "cuda":
        raise UserError("precision float16 needs a GPU; give --precision bfloat16 or float32.")
    environment, local, nodes = surroundings(os.environ, config.devices or count)
    if CALL in os.environ:
        stack.push(end_here)
    if device == "cuda" and local > count:
        if isinstance(environment, SLURMEnvironment):
            raise UserError(f"{local} tasks on this machine, but a task sees only {count} of its GPUs: ask SLURM for "
                            f"--gpus-per-node={local}, and not for --gpus-per-task.")  # fmt: skip
        raise UserError(f"devices = {local}, but this machine has {count}; give --devices {count} or fewer.")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # our own lines say what it would say
    children: list[subprocess.Popen[bytes]] = []
    if isinstance(environment, LightningEnvironment) and local > 1 and "LOCAL_RANK" not in os.environ:
        children = start_others(local)
        stack.push(alone_again)
        stack.callback(end_others, children)
    many = local * nodes > 1
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=timedelta(seconds=patience(config))) if many else "auto",
        plugins=[environment],  # of one process too: left to guess, it warns where srun is not used
    )
    with watching(children):
        try:
            fabric.launch()
        except torch.distributed.DistError as error:
            what = str(error).splitlines()[0].partition(". ")[0]
            raise Stopped(
                f"The processes of this run did not find each other ({what}): give the same command again."
            ) from error
    return fabric


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, torch is as it begins, whatever the program around this run has set: no inference mode, autocast, default
    type or device of another's. Afterwards all that is as it was, and so are its random numbers on the processor."""
    kept = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.callback(torch.set_autocast_enabled, kind, True)
                torch.set_autocast_enabled(kind, False)
        # What autocast has cast it keeps until the outermost one ends: around a run, the weights of its first step.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if torch.get_default_device().type != "cpu":  # seldom, as it makes every call of torch slower
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(torch.set_default_dtype, kept)
        torch.set_default_dtype(torch.float32)
        yield


def patience(config: Config) -> float:
    """Seconds that one process of the run waits for another before it takes it for dead."""
    return parse_duration(config.timeout) if config.timeout else TIMEOUT


def compute_in(fabric: Fabric, precision: str) -> None:
    """The precision of a launched ``fabric``: it is known only when the images are, or the run that is continued."""
    fabric.strategy.precision = fabric._precision = precision_plugin(precision, fabric.device.type)


def use_threads(config: Config) -> None:
    """As many threads as the run began with; of several processes no more than each has cores for."""
    if config.threads is None:
        return
    local, each, _ = share(os.environ, config.devices or 1, cores())
    if config.threads > each and ranks.rank() == 0:
        how = "to the bit, but slowly" if local == 1 else f"with {each}, the same up to rounding"
        say(f"note: {config.threads} threads are asked for, and each process has {each} of the cores here: it goes on "
            f"{how}; --threads {each} --allow threads settles it")  # fmt: skip
    torch.set_num_threads(config.threads if local == 1 else min(config.threads, each))


def precision_plugin(precision: str, device: str) -> Precision:
    """Autocast for everything but float32; float16 also scales the loss, and skips steps whose gradients overflow."""
    if precision == "float32":
        return Precision()
    scaler = torch.amp.GradScaler(device) if precision == "float16" else None
    return MixedPrecision("16-mixed" if scaler else "bf16-mixed", device=device, scaler=scaler)


def surroundings(variables: Mapping[str, str], wanted: int) -> tuple[ClusterEnvironment, int, int]:
    """(who started this process, processes on this machine, machines), from the environment variables.

    torchrun says LOCAL_WORLD_SIZE; srun says SLURM_STEP_NUM_TASKS (a batch script that calls us without srun has the
    other SLURM variables, but is one process). Else it is up to us to start ``wanted``.
    """
    if "LOCAL_WORLD_SIZE" in variables:
        local = int(variables["LOCAL_WORLD_SIZE"])
        return TorchElasticEnvironment(), local, int(variables["WORLD_SIZE"]) // local
    if "SLURM_STEP_NUM_TASKS" in variables:
        tasks, nodes = int(variables["SLURM_STEP_NUM_TASKS"]), int(variables.get("SLURM_STEP_NUM_NODES", 1))
        if tasks % nodes:
            raise UserError(f"{tasks} tasks on {nodes} nodes: give srun the same number on each, --ntasks-per-node")
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))  # Fabric knows srun --ntasks only with it
        return SLURMEnvironment(), tasks // nodes, nodes
    return LightningEnvironment(), wanted, 1


def share(variables: Mapping[str, str], wanted: int, cores: int) -> tuple[int, int, str]:
    """(processes on this machine, cores that each may use, why so many), where this process may use ``cores``.

    srun binds each task to its own cores or leaves it all of them; how many are meant it says in SLURM_CPUS_PER_TASK.
    """
    environment, local, _ = surroundings(variables, wanted)
    if isinstance(environment, SLURMEnvironment):
        each = int(variables.get("SLURM_CPUS_PER_TASK", 0)) or cores // local
        return local, max(1, min(each, cores)), "tasks of srun on each machine"
    why = "processes of torchrun on each machine" if isinstance(environment, TorchElasticEnvironment) else ""
    return local, max(1, cores // local), why or "all that are here"


def for_a_later_call() -> bool:
    """Counts the calls of ``pretrain``. True in a process that another one started for a later call than this."""
    global _calls
    _calls += 1
    return _calls < int(os.environ.get(CALL, 0))


def start_others(local: int) -> list[subprocess.Popen[bytes]]:
    """Starts this very program ``local`` - 1 times more, each told its number by torchrun's variables, and for which
    call it is: it comes there from the top of the program, and ends after it."""
    if hasattr(sys, "ps1") or not hasattr(sys.modules["__main__"], "__file__"):
        raise UserError(f"devices = {local} needs a program that can start again: use the command line or a script")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= dict(zip(TOLD, ("127.0.0.1", str(port), "0", "0", str(local)), strict=True))
    command, call = [sys.executable, *sys.orig_argv[1:]], {CALL: str(_calls)}
    return [
        subprocess.Popen(command, env={**os.environ, **call, "LOCAL_RANK": str(number)}, stdin=subprocess.DEVNULL)
        for number in range(1, local)
    ]


def end_here(kind: type[BaseException] | None, *_: object) -> None:
    """Ends a process that was started for one call: what its program does after that, the first process does."""
    if kind is None:
        raise SystemExit(0)


def end_others(children: list[subprocess.Popen[bytes]]) -> None:
    """Waits for the other processes; one that does not end is killed, for none may outlive the run."""
    for child in children:
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def alone_again(kind: type[BaseException] | None, *_: object) -> None:
    """After the others have ended, this process may train once more; not after an error, when connections may hang."""
    if kind is None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in TOLD:
        os.environ.pop(name, None)


@contextmanager
def watching(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Until all have found each other: a child that dies before that ends this process, which would wait for it."""
    met = threading.Event()

    def watch() -> None:
        while not met.wait(0.2):
            dead = [number for number, child in enumerate(children, 1) if child.poll() is not None]
            if dead:
                code = children[dead[0] - 1].returncode
                why = "could not start (its reason stands above)" if code else "ended before it came to this call"
                say(f"barlow: process {dead[0]} of {len(children) + 1} {why}")
                for child in children:
                    child.kill()
                os._exit(abs(code) or UserError.exit_code)  # the main thread hangs in a call that cannot be ended

    thread = threading.Thread(target=watch, daemon=True)
    if children:
        thread.start()
    try:
        yield
    finally:
        met.set()


def requeue(variables: Mapping[str, str]) -> str | None:
    """Asks SLURM to run this job again, as its signal SIGUSR1 means; returns what came of it, None outside SLURM."""
    job = variables.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{variables['SLURM_ARRAY_TASK_ID']}" if job else variables.get("SLURM_JOB_ID")
    if job is None:
        return None
    if shutil.which("scontrol") is None:
        return f"job {job} is not requeued: there is no scontrol here"
    done: Any = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    return f"job {job} is requeued" if done.returncode == 0 else f"job {job} is not requeued: {done.stderr.strip()}"
