#!/usr/bin/env bash
#SBATCH --job-name=compare
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --ntasks=1
#
# One arm of a comparison, the one that the array's task has the number of:
#
#   python -m pipelines.compare EXPERIMENT ... --submit --sbatch="--partition=gpu --gpus-per-task=1 --time=30"
#
# submits it from the repository's root. Environment, containers, modules: slurm/environment.sh. Signals and exit codes are those
# of slurm/pretrain_himix.sh.
set -uo pipefail

if [[ ! -f slurm/environment.sh ]]; then
    printf 'error: %s is not the root of himix-megatron: submit from there, or with sbatch --chdir\n' "${PWD//[[:cntrl:]]/?}" >&2
    exit 2
fi
source slurm/environment.sh

[[ ${SLURM_ARRAY_TASK_ID:-} =~ ^[0-9]+$ ]] || fail "this is a job of an array: submit it with pipelines.compare --submit"
step+=(--ntasks=1)
run_and_leave -m pipelines.compare "$@" --arm "$SLURM_ARRAY_TASK_ID"
