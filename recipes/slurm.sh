#!/bin/bash
# A run on a SLURM cluster that outlives its time limit: saved before it, queued again, continued to the bit.
#
#   sbatch recipes/slurm.sh photos/ --out runs/photos --epochs 400
#
# Five minutes before the limit SLURM sends SIGUSR1 to every task. barlow finishes the step, saves, asks SLURM to queue the job
# again, and ends with 75; the same command then goes on where it was. What else ends with 75 (a full disk, a connection that
# breaks) and a task that is killed (137) are queued again by this script, as long as the job was started twenty times at
# most; a node that is lost by SLURM itself, for --requeue. scancel ends the job for good, after saving.
#
# Set nodes and GPUs to yours: one task a GPU, and --gpus-per-node, not --gpus-per-task, which hides a task's GPU from the
# others. Images and run folder lie where all nodes see them.
#
# Run for real with SLURM 22.05 (Debian 12) on one machine without GPU that stood for two nodes (docs/log.md, "What a run
# survives"): one node with two tasks, two nodes with one each. Not yet run with GPUs, nor on a cluster of several machines.

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

# srun tells the highest code of all tasks: 137 where one was killed (the others end with 75), 134 where one gave up
# waiting for it. The job is no longer RUNNING where barlow has asked already, or scancel was given; a controller that is too
# busy to say so is asked all the same, twice.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [[ $code =~ ^(75|134|137)$ && ${state:-RUNNING} = RUNNING && ${SLURM_RESTART_COUNT:-0} -lt 20 ]]; then
    scontrol requeue "$SLURM_JOB_ID" || { sleep 30 && scontrol requeue "$SLURM_JOB_ID"; }
fi
exit "$code"
