# What the batch scripts share: checks that a job runs where it can, and makes its environment.
#
#   HIMIX_VENV=DIR             the Python environment (default: .venv in the folder submitted from)
#   HIMIX_CONTAINER=IMAGE      a container with its own Python instead: by pyxis where srun knows it, by apptainer otherwise
#   HIMIX_MOUNTS=DIR[,DIR...]  further folders to show in the container; the folder submitted from is shown always
#   HIMIX_MODULES='NAME ...'   modules to load first, with `module load`
#   HIMIX_SRUN='--OPTION=VALUE ...'  further options of srun, without spaces in a value
#
# Out: `step`, the srun command without its tasks; `python`, how Python is started in it; `run_and_leave`. A mistake ends the
# job with one line and exit code 2. Nothing that a user gives is ever read as shell code.
# shellcheck shell=bash

fail() {
    printf 'error: %s\n' "${1//[[:cntrl:]]/?}" >&2
    exit 2
}

[[ ${SLURM_JOB_ID:-} =~ ^[0-9]+$ ]] || fail "this is a batch script: start it with sbatch"
# bash's arithmetic runs what it finds in a variable, as in 'x[$(command)]': only numbers may reach it.
for name in SLURM_JOB_NUM_NODES SLURM_CPUS_ON_NODE SLURM_CPUS_PER_TASK SLURM_GPUS_ON_NODE; do
    [[ -z ${!name:-} || ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$name is '${!name}': wanted a whole number, as Slurm sets it"
done

# Slurm runs a copy of the script from its spool folder, in the folder it was submitted from: its own path says nothing.
root=$PWD
[[ -f $root/pipelines/pretrain.py ]] || fail "$root is not the root of himix-megatron: submit from there, or with sbatch --chdir"

if [[ -n ${HIMIX_MODULES:-} ]]; then
    [[ $HIMIX_MODULES =~ ^[A-Za-z0-9._/+:\ -]+$ ]] || fail "HIMIX_MODULES is '$HIMIX_MODULES': wanted names of modules, with spaces between them"
    for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh; do
        # shellcheck disable=SC1090 # the site's own
        if ! declare -F module >/dev/null && [[ -f $file ]]; then source "$file"; fi
    done
    declare -F module >/dev/null || fail "HIMIX_MODULES is set, but there is no command 'module' on $(hostname)"
    read -ra modules <<<"$HIMIX_MODULES"
    module load "${modules[@]}" || fail "module load $HIMIX_MODULES failed"
fi

# --export=ALL: a job submitted with --export=NONE would otherwise start its ranks without what was set up here.
# --kill-on-bad-exit: without it the other ranks would wait for a dead one until their collective times out.
step=(srun --export=ALL --kill-on-bad-exit=1)
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not take it from sbatch
fi
if [[ -n ${HIMIX_SRUN:-} ]]; then
    read -rd '' -a options <<<"$HIMIX_SRUN" || true
    for option in "${options[@]}"; do
        [[ $option =~ ^--[a-z] ]] || fail "HIMIX_SRUN has '$option': wanted options as --name=value"
    done
    step+=("${options[@]}")
fi

if [[ -n ${HIMIX_CONTAINER:-} ]]; then
    image=$HIMIX_CONTAINER
    [[ -z ${HIMIX_VENV:-} ]] || fail "HIMIX_VENV and HIMIX_CONTAINER are both set: a container brings its own Python, unset one"
    [[ $image != -* ]] || fail "HIMIX_CONTAINER is '$image': wanted an image"
    [[ ($image != /* && $image != *.sif && $image != *.sqsh) || -e $image ]] || fail "HIMIX_CONTAINER: there is no '$image'"
    [[ $root != *[:,]* ]] || fail "$root cannot be shown in a container: its name has a comma or a colon"
    mounts=$root${HIMIX_MOUNTS:+,$HIMIX_MOUNTS}
    python=(python)
    if [[ $image != *.sif && $(srun --help 2>&1) == *--container-image* ]]; then
        shown=
        IFS=, read -rd '' -a folders <<<"$mounts" || true
        for folder in "${folders[@]}"; do # pyxis wants both sides named
            folder=${folder%$'\n'}
            [[ $folder == *:* ]] || folder=$folder:$folder
            shown+=${shown:+,}$folder
        done
        step+=(--container-image="$image" --container-mounts="$shown" --container-workdir="$root")
    elif runtime=$(command -v apptainer || command -v singularity); then
        python=("$runtime" exec --pwd "$root" --bind "$mounts" "$image" python)
        if [[ -e /dev/nvidiactl ]]; then
            python=("$runtime" exec --nv "${python[@]:2}")
        fi
    else
        fail "HIMIX_CONTAINER is set, but srun has no --container-image (pyxis) and apptainer is not installed on $(hostname)"
    fi
else
    venv=${HIMIX_VENV:-$root/.venv}
    [[ -x $venv/bin/python ]] || fail "no environment in $venv: run 'make setup', or name one with HIMIX_VENV"
    # By its path, not by sourcing bin/activate: that file may be anybody's.
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    python=("$venv/bin/python")
fi

# Ranks that each use every core slow each other down many times over.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# When one rank exits with a code, srun sends the others TERM, and reports the highest code of all. So that a failure of one is
# not taken for a request to requeue, 1, 2 and 3 travel as 101, 102 and 103. A rank that gets a stop request before it has anything
# to save, or before Python could listen, exits with 84, below 85. The shell itself lets signals pass, and waits.
export HIMIX_UNSAVED_CODE=84
# shellcheck disable=SC2016 # expanded in the tasks
rank='trap : TERM USR1 USR2; "$@"; code=$?
case $code in 138 | 140 | 143) exit 84 ;; 1 | 2 | 3) exit $((code + 100)) ;; *) exit $code ;; esac'

# Python with these arguments in every task; then the job is put back into the queue (85), or ends with the step's code.
run_and_leave() {
    "${step[@]}" bash -c "$rank" rank "${python[@]}" "$@"
    local code=$?
    case $code in
        101 | 102 | 103) code=$((code - 100)) ;;
        84 | 85) requeue "$code" && code=85 ;;
    esac
    [[ $code -eq 0 || $code -eq 2 || $code -eq 3 || $code -eq 85 ]] || wait_for_lost_nodes
    exit "$code"
}

requeue() {
    # A signal that always comes at once (sent earlier than the time limit allows) would requeue the job for ever, and no step
    # would ever be taken. The job's comment counts, unless the user has written one.
    local code=$1 known count=0
    known=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    if [[ $known != *" Comment="* || $known =~ \ Comment=himix-unbegun-([0-9]{1,9}) ]]; then
        [[ $known != *" Comment="* ]] || count=$((10#${BASH_REMATCH[1]})) # 08 is no octal number
        if ((code == 85)); then count=0; else ((count += 1)); fi
        if ((count > 5)); then
            echo "error: asked to stop before the first step, $count times in a row: the job is not requeued again" \
                "(does --signal come earlier than --time allows?)" >&2
            exit 3
        fi
        scontrol update "JobId=$SLURM_JOB_ID" "Comment=himix-unbegun-$count"
    fi
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "error: the work is saved, but the job cannot be put back into the queue: submit the same command again" >&2
}

# Where a node is lost, the ranks on the others fail long before Slurm has noticed. It will put the job back into the queue, on
# other nodes, if the job is there when it does.
wait_for_lost_nodes() {
    local nodes=$SLURM_JOB_NUM_NODES
    [[ $nodes -gt 1 ]] || return
    # All nodes must answer; if not even this one does, it is srun that fails, and there is nothing to wait for.
    answers "$nodes" || { answers 1 --nodelist="$SLURMD_NODENAME" && {
        echo "a node of this job does not answer: waiting until Slurm requeues the job, ten minutes at most" >&2
        sleep 600
    }; }
}

answers() {
    timeout 20 srun --overlap --nodes="$1" --ntasks="$1" --ntasks-per-node=1 "${@:2}" true >/dev/null 2>&1
}
