#!/bin/bash
# A run on a SLURM cluster that outlives its time limit: saved before it, queued again, continued to the bit.
#
#   sbatch recipes/slurm.sh photos/ --out runs/photos --epochs 400
#
# Five minutes before the limit SLURM sends SIGUSR1 to every task. barlow finishes the step, saves, asks SLURM to queue the job
# again, and ends with 75; the same command then goes on where it was. What else ends with 75 (a node that is lost, a
# full disk) is queued again by this script, twenty times at most. scancel ends it for good.
#
# Set nodes and GPUs to yours: one task a GPU, and --gpus-per-node, not --gpus-per-task, which hides a task's GPU from the
# others. Images and run folder lie where all nodes see them. Not yet run on a real cluster: the tests run this very
# script with stand-ins for SLURM's commands, and real processes.

#SBATCH --job-name=barlow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=barlow-%j.log

srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" barlow pretrain "$@"
code=$?

state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) # no longer RUNNING where barlow has asked already
if [ "$code" -eq 75 ] && [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
