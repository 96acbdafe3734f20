#!/usr/bin/env bash
#SBATCH --job-name=himix-data
#SBATCH --output=himix_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --ntasks-per-node=1
#
# Preprocess on the nodes of a Slurm job, with a Ray cluster that lives as long as the job does:
#
#   sbatch --nodes 4 --cpus-per-task 32 slurm/preprocess_ray.sh --source llava --annotations FILE.json --images DIR --out DIR
#
# Arguments are those of `python -m pipelines.preprocess`; the bytes are those of a run on one machine. Submit from the
# repository's root; source and OUT on a file system that all nodes see. Environment: slurm/environment.sh. A minute before the
# time limit (USR1), and when preempted, the job is put back into the queue, and keeps the shards that are done.
set -uo pipefail

if [[ ! -f slurm/environment.sh ]]; then
    printf 'error: %s is not the root of himix-megatron: submit from there, or with sbatch --chdir\n' "${PWD//[[:cntrl:]]/?}" >&2
    exit 2
fi
source slurm/environment.sh

# Other users of these nodes can reach Ray's ports: it answers only with this job's token.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

step+=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
run_and_leave -m pipelines.launchers.ray_cluster "$@"
