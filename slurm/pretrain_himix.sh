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
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-gpu 8 slurm/pretrain_himix.sh qwen2_0_5b_align --data.datasets /data/llava
#
# Submit from the repository's root. RECIPE defaults to tiny_align, which runs anywhere. Without GPUs, a node gets
# one task, or --ntasks-per-node. Environment, containers, modules: slurm/environment.sh. A minute before the time limit (USR1),
# and when preempted, the run saves and exits with 85: the job is put back into the queue and continues from there. Any other
# code ends it: 0 done, 1 failed, 2 a mistake in the settings, 3 stopped on purpose (RUN/STOP says why).
set -uo pipefail

if [[ ! -f slurm/environment.sh ]]; then
    printf 'error: %s is not the root of himix-megatron: submit from there, or with sbatch --chdir\n' "${PWD//[[:cntrl:]]/?}" >&2
    exit 2
fi
source slurm/environment.sh

if [[ $# -eq 0 || $1 == -* ]]; then
    set -- tiny_align "$@"
fi

if [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[1-9][0-9]*$ && -z ${SLURM_NTASKS_PER_NODE:-}${SLURM_NTASKS:-} ]]; then
    step+=(--ntasks="$((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$SLURM_GPUS_ON_NODE")
    if ((SLURM_CPUS_ON_NODE < SLURM_GPUS_ON_NODE)); then
        echo "note: $SLURM_GPUS_ON_NODE ranks share $SLURM_CPUS_ON_NODE CPUs on a node: sbatch --cpus-per-gpu N gives them more" >&2
        step+=(--overcommit)
    fi
fi

run_and_leave -m pipelines.pretrain "$@"
