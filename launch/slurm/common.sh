# shellcheck shell=bash
# Sourced by the .sbatch files of this folder, inside a SLURM job: environment, rendezvous, one task per GPU under srun,
# and what happens when the job is pre-empted, runs out of time or crashes.  launch/slurm/README.md explains its use.
#
# Variables that a user may set (sbatch passes the environment on):
#   MODULES="gcc cuda/12.8"   modules to load             SETUP=FILE          a shell file to source
#   CONDA_ENV=NAME            conda environment           VENV=FOLDER         virtual environment; default: .venv if there
#   APPTAINER_IMAGE=X.sif     run inside Apptainer        PYXIS_IMAGE=IMAGE   run inside enroot, through Pyxis
#   CONTAINER_MOUNTS=A,B      more folders to mount       PYTHON=python3      the interpreter
#   PREFLIGHT=1               check all nodes first, as the flag --preflight does
#   PREFLIGHT_FLAGS=...       of launch/preflight.py
#   LOG_DIR=FOLDER            default: slurm-logs/<job>   CPU_BIND=cores      srun's --cpu-bind
#   MASTER_PORT=N             rendezvous port; default: a number made from the job's id and its restarts
#   NODE_WAIT=600             seconds to wait for SLURM to notice a lost node; default: twice its usual SlurmdTimeout
#
# Network.  NCCL and gloo find their interfaces by themselves; on machines with several they may need a hint:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0     the interface all nodes share (bootstrap, CPU collectives)
#   export NCCL_IB_HCA=mlx5_0,mlx5_1                         InfiniBand adapters that carry data, not storage
#   export NCCL_DEBUG=INFO                                   says which of them it took; read it once on a new cluster
case ${1:-} in -h | --help) sed -n '1,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
set -euo pipefail

say() { printf '%s %s: %s\n' "$(date +%FT%T)" "${SLURM_JOB_NAME:-job}" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# What a shell calculates with may run commands.
whole() { # NAME...: variables that, if set, must be plain numbers
    local name
    for name; do
        [[ ${!name:-0} =~ ^(0|[1-9][0-9]{0,9})$ ]] || fail "$name=$(printf %q "${!name:0:80}") is no whole number"
    done
}
words_of() { # NAME ARRAY: the blank-separated words of a variable, none of them a pattern for files
    read -r -d '' -a "$2" <<<"${!1:-}" || :
}
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no SLURM job: submit the file with sbatch"
whole SLURM_JOB_ID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SLURM_CPUS_PER_TASK SLURM_JOB_NUM_NODES \
    MASTER_PORT NODE_WAIT

# A task of an array is named ARRAY_TASK: its plain id may be the whole array's.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}}
job=${job:-$SLURM_JOB_ID}
logs=$(realpath -m -- "${LOG_DIR:-slurm-logs/$job}")
wrap=() step=() event=

environment() {
    # Other people's scripts seldom bear -u.
    set +u
    # shellcheck disable=SC1090
    if [ -n "${SETUP:-}" ]; then source "$SETUP"; fi
    if [ -n "${MODULES:-}" ]; then
        command -v module >/dev/null || fail "MODULES=$MODULES: no module command in this job; SETUP=FILE may define it"
        local modules
        words_of MODULES modules
        module load "${modules[@]}"
    fi
    if [ -n "${CONDA_ENV:-}" ]; then
        command -v conda >/dev/null || fail "CONDA_ENV=$CONDA_ENV: no conda on PATH; MODULES or SETUP=FILE may bring it"
        eval "$(conda shell.bash hook)"
        conda activate "$CONDA_ENV"
    fi
    set -u
    local venv=${VENV:-$home/.venv}
    if [ -e "$venv/bin/python" ]; then
        export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
    elif [ -n "${VENV:-}" ]; then
        fail "VENV=$VENV has no bin/python"
    fi
    python=${PYTHON:-python}
    # The logs too: there the ranks say how far they came.
    mkdir -p "$logs" || exit 2
    local mounts="$home,$PWD,$logs${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    if [ -n "${APPTAINER_IMAGE:-}" ]; then
        wrap=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$APPTAINER_IMAGE")
    elif [ -n "${PYXIS_IMAGE:-}" ]; then
        local binds
        binds=$(tr ',' '\n' <<<"$mounts" | sed '/:/!s/.*/&:&/' | paste -sd, -)
        step=(--container-image="$PYXIS_IMAGE" --container-mounts="$binds" --container-workdir="$PWD")
    else
        command -v "$python" >/dev/null || fail "no $python on PATH: set MODULES, CONDA_ENV, VENV, PYTHON or a container"
    fi
}

rendezvous() {
    # Of a shell that was itself a rank: srun's tasks would take them for their own.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE "${!TORCHELASTIC_@}" "${!OMPI_COMM_WORLD_@}"
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Two jobs on one node have different ids, hence different ports, and a restart may find the last one's taken; below
    # the range the kernel gives out itself.
    export MASTER_ADDR
    export MASTER_PORT=${MASTER_PORT:-$((10000 + 2 * ((SLURM_JOB_ID + 379 * ${SLURM_RESTART_COUNT:-0}) % 11000)))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export MINIMIND_DS_OUTCOME=$logs/outcome
    rm -f "$MINIMIND_DS_OUTCOME"
    # Of another job, with the same LOG_DIR.
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then rm -f "$logs/failed_starts"; fi
    say "job $job, restart ${SLURM_RESTART_COUNT:-0}: ${SLURM_NTASKS:-all} tasks on $SLURM_JOB_NODELIST," \
        "rendezvous $MASTER_ADDR:$MASTER_PORT; output of the ranks: $logs"
}

tasks() { # PROGRAM [FLAG...]: launch/PROGRAM.py, one task per GPU
    local log
    log=${logs//%/%%}/$1-rank%4t.log
    # A rank that fails must not have its exit code drowned by those of ranks killed for it: hence the wait.
    srun --kill-on-bad-exit=0 --wait=60 --input=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --cpu-bind="${CPU_BIND:-cores}" --open-mode=append --output="$log" --error="$log" "${step[@]}" \
        "${wrap[@]}" "$python" "$home/launch/$1.py" "${@:2}"
}

take_preflight() { # [FLAG...]: --preflight is PREFLIGHT=1, the others are in `others`
    local word
    others=()
    for word; do
        if [ "$word" = --preflight ]; then PREFLIGHT=1; else others+=("$word"); fi
    done
}

preflight() { # the flags of the training, of which it reads the folders
    [ "${PREFLIGHT:-0}" = 1 ] || return 0
    local code=0 flags
    words_of PREFLIGHT_FLAGS flags
    MASTER_PORT=$((MASTER_PORT + 1)) tasks preflight "$@" "${flags[@]}" || code=$?
    cat "$logs/preflight-rank0000.log"
    if [ $code != 0 ] && [ -n "$event" ]; then
        if [ "$event" = USR1 ]; then count_failed_start "time limit (USR1)" "$program" "$@"; fi
        requeue "stopped by $event"
    fi
    [ $code = 0 ] || fail "the pre-flight check failed (exit code $code); nothing was started"
}

on_signal() {
    say "received $1"
    # Once per event: the warning before a time limit is followed by SIGTERM.
    [ -z "$event" ] || return 0
    event=$1
    # Reaches the tasks, not this script; each finishes its step, writes a checkpoint and ends.  More than once, since
    # the tasks may not be there yet; a second SIGUSR1 means nothing to them.  Never longer than this script lives, be
    # it killed: the next start of the job has the same id.  For the same reason scancel must not live on: it tries
    # again, after 5 s and more, while SLURM is about to requeue the job.
    while kill -0 $$ 2>/dev/null; do timeout 3 scancel --signal=USR1 "$job" || :; sleep 5; done &
    repeater=$!
    trap 'kill "$repeater" 2>/dev/null || :' EXIT
}

state() { # of the job.  The script runs, hence SLURM knows the job: no answer means a busy controller.
    local tries
    for tries in 1 2 3 4 5 6; do
        squeue --noheader --jobs="$job" --format=%T 2>/dev/null && return
        sleep $((tries * 5))
    done
}

silent_nodes() { # those of the job's nodes on which no task can be started
    local answered
    # --overlap: the training's own step may not have ended everywhere.
    answered=$(timeout --kill-after=2 10 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --ntasks="$SLURM_JOB_NUM_NODES" --input=none printenv SLURMD_NODENAME 2>/dev/null || :)
    # No answer from this very node says nothing of the others.
    grep -qxF "$SLURMD_NODENAME" <<<"$answered" || return 0
    scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$answered" || :
}

await_verdict() { # A rank is gone, and perhaps its node: ranks notice at once what SLURM sees after minutes
    local silent told='' deadline=$((SECONDS + ${NODE_WAIT:-600}))
    # A lone node is this one.
    [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] || return 0
    # SLURM requeues a job that has lost a node by itself; one that requeues itself before may be given the dead node
    # again.
    while [ "$(state)" = RUNNING ]; do
        # SLURM knows, and leaves the job as it is: sbatch --no-kill.
        if sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --format=%t | grep '^down' >/dev/null; then return 0; fi
        silent=$(silent_nodes | paste -sd, -)
        [ -n "$silent" ] || return 0
        if [ $SECONDS -ge $deadline ]; then
            say "SLURM has not noticed within ${NODE_WAIT:-600} s (NODE_WAIT) that $silent is gone"
            return 0
        fi
        if [ -z "$told" ]; then
            told="no answer from $silent: waiting for SLURM to notice, up to ${NODE_WAIT:-600} s (NODE_WAIT)"
            say "$told"
        fi
        sleep 1
    done
    # SLURM has taken the job back, or it was cancelled: this start counts for nothing, should the script live on.
    requeue "a rank is gone"
}

requeue() { # WHY
    local state tries
    for tries in 1 2 3; do
        state=$(state)
        # A cancelled job, or one that SLURM itself has requeued or is about to, is no longer running.
        if [ "$state" != RUNNING ]; then
            say "$1; the job is ${state:-gone}: not requeued"
            exit 75
        fi
        say "$1: requeued, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
        if scontrol requeue "$job"; then exit 75; fi
        sleep $((tries * 5))
    done
    say "scontrol requeue failed; the same sbatch command goes on from the checkpoint"
    exit 75
}

count_failed_start() { # WHAT ENDED IT, PROGRAM [FLAG...]: ends the job at the third in a row without progress
    local ends hint=
    echo "$1" >>"$logs/failed_starts"
    [ "$(wc -l <"$logs/failed_starts")" -ge 3 ] || return 0
    ends=$(paste -sd, "$logs/failed_starts" | sed 's/,/, /g')
    if grep -q '^time limit' "$logs/failed_starts"; then
        hint="; starting takes longer than the time limit: run \`$python $home/launch/tokenize_data.py --program ${*:2}\`"
        hint+=" first, or raise --time"
    fi
    # By hand it is tried again.
    rm -f "$logs/failed_starts"
    fail "the program did not come to train, three times in a row, nor to tokenise more (ended by: $ends)$hint; see $logs"
}

train() { # PROGRAM [FLAG...]; %a in a flag is the number of the array's task
    take_preflight "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
    set -- "${others[@]}"
    case " $* " in
    *" --deepspeed"[\ =]* | *" --config"[\ =]*) ;;
    *) set -- "$@" --deepspeed "$home/ds_configs/zero1.json" ;;
    esac
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    environment
    rendezvous
    local program=$1
    preflight "${@:2}"
    tasks "$@" &
    local pid=$! code outcome
    while :; do
        code=0
        wait "$pid" || code=$?
        # A trapped signal ends the wait early.
        kill -0 "$pid" 2>/dev/null || break
    done
    # Not srun's exit code: it may be 0 after a cancel or a lost node.
    outcome=$(cat "$MINIMIND_DS_OUTCOME" 2>/dev/null || :)
    say "srun ended with $code; the training says: ${outcome:-nothing}"
    if [ "$outcome" = "done" ]; then exit 0; fi
    tail -n 20 "$logs/$1-rank0000.log" 2>/dev/null || :
    if [ "$outcome" != stopped ]; then await_verdict; fi
    # A user's mistake; ranks that did not meet, at a port that is taken perhaps, may do so at the next one.
    if [ "$code$event" = 2 ] && [[ $outcome != @(unmet|training|stopped) ]]; then exit 2; fi
    case $outcome:$event in
    tokenised:* | training:* | stopped:*) rm -f "$logs/failed_starts" ;;
    # It never came as far as training.  Room for another job says nothing of this one; a broken installation would
    # fail for ever, and so would a time limit that is too short to start.
    *:TERM) ;;
    *:USR1) count_failed_start "time limit (USR1)" "$@" ;;
    *) count_failed_start "exit code $code" "$@" ;;
    esac
    if [ -n "$event" ]; then requeue "stopped by $event"; fi
    case $outcome in
    stopped) requeue "stopped" ;;
    # The program itself refuses to go on after three failures at one step.
    training) requeue "the training failed" ;;
    esac
    requeue "the program did not start (exit code $code)"
}
