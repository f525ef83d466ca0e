#!/usr/bin/env bash
# A table of the paper on a Slurm cluster, one row per array task, all GPUs of a node each:
#
#   sbatch --array=1-10 pipelines/slurm.sh --table 1 --store /fast/targets.zarr
#
# Rows that share a pretraining (3 and 6 of table 2, tables side by side) wait for it on their node:
# --array=1-6%1 takes one row after the other.
#
# Shortly before the time limit it saves, and queues itself again to go on. When all are done,
# occfeat-reproduce with the same options and --report-only prints the whole table.
# Partition, account and the like go on the sbatch line; activate the environment before it.
#SBATCH --job-name=occfeat
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

python -m occfeat_pipelines.reproduce ${SLURM_ARRAY_TASK_ID:+--rows "$SLURM_ARRAY_TASK_ID"} "$@" &
child=$!
again=false
trap 'again=true; kill -TERM $child' TERM

status=0
wait $child || status=$?
if $again; then
    wait $child || true # the first wait only heard the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit $status
