#!/usr/bin/env bash
#SBATCH --job-name=himix
#SBATCH --output=himix_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
#
# Pretrain on a Slurm cluster, one task per GPU:
#
#   sbatch slurm/pretrain_himix.sh [RECIPE] [--section.field value ...]
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 slurm/pretrain_himix.sh qwen2_0_5b_align --data.path /data/llava
#
# Submit from the repository's root. RECIPE defaults to tiny_align, which runs anywhere. The environment is .venv there, or
# the folder that HIMIX_VENV names. A minute before the time limit (USR1), and when preempted, the run saves and exits with
# 85: the job is put back into the queue and continues from there. Any other code ends it.
set -uo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: this is a batch script: start it with sbatch" >&2
    exit 2
fi
# Slurm runs a copy of this file from its spool folder, in the folder it was submitted from: its own path says nothing.
root=$PWD
if [[ ! -f $root/pipelines/pretrain.py ]]; then
    echo "error: $root is not the root of himix-megatron: submit from there, or with sbatch --chdir" >&2
    exit 2
fi
venv=${HIMIX_VENV:-$root/.venv}
if [[ ! -f $venv/bin/activate ]]; then
    echo "error: no environment in $venv: run 'make setup', or name one with HIMIX_VENV" >&2
    exit 2
fi
# shellcheck disable=SC1091 # made by make setup
source "$venv/bin/activate"

if [[ $# -eq 0 || $1 == -* ]]; then
    set -- tiny_align "$@"
fi

tasks=()
if [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[1-9][0-9]*$ && -z ${SLURM_NTASKS_PER_NODE:-} ]]; then
    tasks=(--ntasks="$((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$SLURM_GPUS_ON_NODE")
fi

# Without --kill-on-bad-exit the other ranks would wait for a dead one until their collective times out. With it, the first
# rank to leave with 85 has the others sent TERM: ranks on their way out ignore it, or srun would report 143 instead of 85.
srun --kill-on-bad-exit=1 ${tasks[@]+"${tasks[@]}"} python -m pipelines.pretrain "$@"
code=$?
if [[ $code -eq 85 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
