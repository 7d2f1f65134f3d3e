"""recipes/slurm.sh: the script itself, with stand-ins for SLURM's commands that do what SLURM does, and real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from barlow import pretrain
from barlow.config import Config, to_toml

SCRIPT = Path(__file__).parents[1] / "recipes" / "slurm.sh"
# sbatch: runs the script, and again for as long as the job was requeued meanwhile.
SBATCH = """#!/bin/bash
export SLURM_JOB_ID=4711 SLURM_CPUS_PER_TASK=1 SLURM_RESTART_COUNT=0
while true; do
    bash "$@" && code=0 || code=$?
    echo "$code" >> codes
    [ -e requeued ] || exit "$code"
    rm requeued
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
# srun: as many tasks as TASKS says, each told its number; the highest exit code of all.
SRUN = """#!/bin/bash
[[ "$1" == --cpus-per-task=* ]] && shift
export SLURM_NTASKS=$TASKS SLURM_STEP_NUM_TASKS=$TASKS SLURM_STEP_NUM_NODES=1 SLURM_NODELIST=127.0.0.1
export SLURM_JOB_NODELIST=127.0.0.1 SLURM_NODEID=0
for ((k = 0; k < TASKS; k++)); do
    SLURM_PROCID=$k SLURM_LOCALID=$k "$@" &
    tasks[k]=$!
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
[ "$*" = "requeue 4711" ] || exit 1
[ -e requeued ] && { echo "Job is pending execution" >&2; exit 1; }
touch requeued
echo "$*" >> asked
"""
SQUEUE = "#!/bin/bash\n[ -e requeued ] && echo PENDING || echo RUNNING\n"
# barlow, in whose first life the limit comes near after step 3: SLURM then signals every task.
BARLOW = f"""#!{sys.executable}
import os, signal, sys
import torch
from barlow.cli import main
from barlow.session import Session
torch.set_num_threads(1)
took = Session.took
def also(self, *rest):
    took(self, *rest)
    if self.step == 3 and os.environ["SLURM_RESTART_COUNT"] == "0":
        signal.raise_signal(signal.SIGUSR1)
Session.took = also
main(sys.argv[1:])
"""


def cluster(folder: Path, barlow: str, tasks: int = 1) -> dict[str, str]:
    """The environment in which sbatch is called: SLURM's commands and barlow on the path."""
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "barlow": barlow}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join(str(Path(place).resolve()) for place in sys.path if place)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TASKS": str(tasks), "PYTHONPATH": path}


def submit(folder: Path, environment: dict[str, str], *words: str) -> tuple[list[int], str]:
    """(exit codes of the lives of the job, what it said)."""
    done = subprocess.run(
        ["sbatch", str(SCRIPT), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return [int(code) for code in (folder / "codes").read_text().split()], done.stderr


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_job_outlives_its_time_limit(tiny: Callable[..., Config], tmp_path: Path, tasks: int) -> None:
    """Signalled, saved, requeued once, and continued to the end: the curve is that of a run that was left alone."""
    config = tiny(optimizer="adamw", lr=2e-4, steps=6, devices=tasks)
    (tmp_path / "settings.toml").write_text(to_toml(config))
    codes, said = submit(tmp_path, cluster(tmp_path, BARLOW, tasks), "--config", "settings.toml")
    assert codes == [75, 0], said
    assert "SLURM: job 4711 is requeued" in said
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    alone = pretrain(tiny(optimizer="adamw", lr=2e-4, steps=6, out=str(tmp_path / "alone")), quiet=True)
    losses = [
        [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for run in (tmp_path / "run", alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if tasks == 1 else 1e-5)
    assert len(losses[0]) == 6


@pytest.mark.parametrize(
    ("barlow", "codes"),
    [
        ("exit $((SLURM_RESTART_COUNT < 2 ? 75 : 0))", [75, 75, 0]),  # a node was lost, twice
        ("exit 75", [75] * 21),  # a disk that stays full
        ("exit $((SLURM_RESTART_COUNT < 1 ? 137 : 0))", [137, 0]),  # one task of many killed
        ("exit 2", [2]),
        ("exit 143", [143]),  # scancel
    ],
)
def test_which_endings_are_queued_again(tmp_path: Path, barlow: str, codes: list[int]) -> None:
    environment = cluster(tmp_path, f"#!/bin/bash\n{barlow}\n")
    assert submit(tmp_path, environment, "photos/", "--out", "runs/photos")[0] == codes


def test_a_controller_that_is_too_busy_to_answer(tmp_path: Path) -> None:
    environment = cluster(tmp_path, "#!/bin/bash\nexit $((SLURM_RESTART_COUNT < 1 ? 75 : 0))\n")
    (tmp_path / "bin" / "squeue").write_text(
        "#!/bin/bash\necho 'slurm_load_jobs error: Socket timed out' >&2\nexit 1\n"
    )
    assert submit(tmp_path, environment, "photos/", "--out", "runs/photos")[0] == [75, 0]


def test_what_the_script_asks_of_slurm() -> None:
    asked = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=USR1@300" in asked  # to the tasks: with B: it would reach this shell only
    assert "#SBATCH --requeue" in asked
    assert os.access(SCRIPT, os.X_OK)
