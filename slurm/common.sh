# What the templates share; sourced by them inside a job, from the repository's root.
#
#   name_run ARGUMENT...     M3I_RUN, the run's name, as the configuration and the overrides give it
#   new_attempt RUN_FOLDER   log folder, restart counting; gives up when restarts bring no progress
#   rendezvous               MASTER_ADDR and MASTER_PORT, from Slurm's own variables
#   preflight                checks the nodes; excludes a bad one and requeues (M3I_PREFLIGHT=yes)
#   conclude EXIT_CODE       finished, stopped, broken: what happens next
#
# Expects from a template's site block: M3I_DEVICE, M3I_PREFLIGHT, M3I_MAX_STUCK, and the arrays
# `python` (the interpreter, in its container if there is one) and `srun_options`.

set -uo pipefail
# Slurm sends SIGTERM to this script along with the ranks (scontrol requeue, scancel); it must live to
# see how they end, and to say so.
trap '' TERM

say() { echo "$(date '+%F %T') [job $SLURM_JOB_ID, restart $restart] $*"; }

restart=${SLURM_RESTART_COUNT:-0}
mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?not inside a Slurm job}")

# A launcher's variables in the submitting shell would be taken for this job's.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
# Since Slurm 22.05 srun does not take over the batch script's --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
# Compiled Triton kernels: in the home directory all ranks of all nodes would write and lock the same
# files on a network file system. On the node's own disk they are found again after a requeue.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$UID-$SLURM_JOB_ID}

# One task that ends must not kill the others at once, because ranks that were asked to stop all
# leave with code 85 within seconds of each other; but none may wait for a dead peer for long.
srun_options+=(--kill-on-bad-exit=0 --wait=60)

# The last lines of a file in which a progress bar may have overwritten one line many times.
ending() { tail -c 4000 "$1" 2> /dev/null | tr '\r' '\n' | tail -n 20; }

# A word as a YAML string, for overrides: a name like 'yes' or '2024' must stay a name.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

name_run() {
    [[ -z ${M3I_RUN:-} ]] || return 0
    local code
    M3I_RUN=$("${python[@]}" -m m3i_scale.train --config "$M3I_CONFIG" "$@" --print run | tail -n 1)
    code=$?  # of Python: pipefail
    (( code == 2 )) && exit 2  # it has said why
    if (( code != 0 )) || [[ -z $M3I_RUN ]]; then
        # The interpreter may exist in srun's container only.
        say "${python[*]} prints no run name on this node (exit code $code); taking it from the line" \
            "'run:' of $M3I_CONFIG. Set M3I_RUN if it stands elsewhere"
        M3I_RUN=$(sed -n "/^run:/{s/^run:[[:space:]]*//p;q}" "$M3I_CONFIG")
        case $M3I_RUN in
            \'*) M3I_RUN=${M3I_RUN#\'}; M3I_RUN=${M3I_RUN%%\'*} ;;
            \"*) M3I_RUN=${M3I_RUN#\"}; M3I_RUN=${M3I_RUN%%\"*} ;;
            *) M3I_RUN=$(sed 's/[[:space:]]#.*//; s/[[:space:]]*$//' <<< "$M3I_RUN") ;;
        esac
    fi
}

newest_step() {
    local marker step=0
    for marker in "$run_folder"/checkpoints/step-*/complete.json; do
        [[ $marker =~ /step-([0-9]+)/complete.json$ ]] && step=$((10#${BASH_REMATCH[1]}))
    done
    echo "$step"
}

new_attempt() {
    run_folder=$1
    if [[ $run_folder == */ ]]; then
        say "the run has no name: set M3I_RUN, or give $M3I_CONFIG a key run; see also that" \
            "M3I_PYTHON ('${python[*]}') is an interpreter in which m3i_scale is installed"
        exit 2
    fi
    logs=$run_folder/logs/$SLURM_JOB_ID-$restart
    mkdir -p "$logs" && ln -sfn "$SLURM_JOB_ID-$restart" "$run_folder/logs/latest" || exit 1
    # A rank that ends with code 2 writes its reason here (m3i_scale/engine/ending.py): with NCCL the
    # others hang until srun kills them, and srun's exit code is then that of the kill.
    # One that ends with code 89 was wrong, or found another one wrong: nodes to leave out.
    export M3I_FAILURE=$logs/failure M3I_BAD_NODES=$logs/corrupt-nodes
    # For `m3i report`: since when this start has been queued (Slurm sets it anew when it requeues), and
    # when it began.
    local queued
    queued=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* SubmitTime=\([^ ]*\).*/\1/p')
    M3I_SUBMITTED=$(date -d "${queued:-none}" +%s 2> /dev/null) || M3I_SUBMITTED=
    M3I_JOB_STARTED=$(date +%s)
    export M3I_SUBMITTED M3I_JOB_STARTED
    local attempts=$run_folder/logs/attempts step stuck
    step=$(newest_step)
    # One line per attempt. Restarts in a row that found no newer checkpoint than the attempt before
    # them are stuck; a new submission starts counting anew.
    echo "$SLURM_JOB_ID $restart $step" >> "$attempts"
    stuck=$(awk -v job="$SLURM_JOB_ID" -v last=-1 \
        '$1 == job { stuck = $3 == last ? stuck + 1 : 0; last = $3 } END { print stuck }' "$attempts")
    say "starts on ${nodes[*]}; the newest checkpoint is of step $step; the ranks' logs are in $logs"
    if (( stuck >= M3I_MAX_STUCK )); then
        say "gives up: $stuck restarts in a row without a new checkpoint. See $run_folder/logs/," \
            "mend the cause and submit again; training will go on from step $step."
        exit 1
    fi
}

rendezvous() {
    local tasks=${SLURM_NTASKS_PER_NODE:-} gpus=${SLURM_GPUS_PER_NODE:-}
    gpus=${gpus##*:}  # h100:8 -> 8
    [[ $gpus == 0 ]] && gpus=  # asked for without any, on nodes that have none
    if [[ $tasks && $gpus && $tasks != "$gpus" ]]; then
        say "--ntasks-per-node is $tasks and --gpus-per-node is $gpus: make them equal, one task per GPU"
        exit 2
    fi
    # The address by which Slurm itself reaches the first node, so that it need not be in the DNS.
    MASTER_ADDR=$(scontrol show node -o "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    # Another port for every job and every restart, below the range of outgoing connections.
    MASTER_PORT=$((15000 + (SLURM_JOB_ID * 7 + restart) % 15000))
    export MASTER_ADDR MASTER_PORT
}

preflight() {
    [[ $M3I_PREFLIGHT == yes ]] || return 0
    local bad=$logs/bad-nodes
    srun "${srun_options[@]}" --wait=600 --output="$logs/preflight.log" \
        "${python[@]}" -m m3i_scale.cluster.node_check --folder "$run_folder" --device "$M3I_DEVICE" \
        --nodes "$(IFS=,; echo "${nodes[*]}")" --bad-nodes "$bad"
    local code=$?
    (( code == 0 )) && return
    ending "$logs/preflight.log"
    if [[ -s $bad ]]; then
        requeue "$(paste -sd, "$bad")"
    fi
    if not_startable $code "$logs/preflight.log"; then
        say "the check of the nodes cannot be started, and a restart would not help: is M3I_PYTHON" \
            "('${python[*]}') an interpreter, on all nodes, in which m3i_scale is installed?"
        exit 2
    fi
    say "pre-flight failed (exit code $code) and no single node is to blame"
    requeue
}

# not_startable EXIT_CODE LOG: whether it was a mistake that a restart repeats. 2 is ours, and Slurm's
# where a program cannot be executed; 126 and 127 are the shell's; an interpreter without the project's
# packages ends with 1 and says so in its last line.
not_startable() {
    [[ $1 == 2 || $1 == 126 || $1 == 127 ]] || ending "$2" | tail -n 1 | grep -q 'No module named'
}

conclude() {
    local code=$1
    # What srun said, the first task that failed first; the others fail because of it.
    [[ -s $logs/srun.log ]] && cat "$logs/srun.log"
    if [[ -s $M3I_FAILURE ]]; then
        say "cannot go on, and a restart would not help:"
        cat "$M3I_FAILURE"
        exit 2
    fi
    (( code != 0 )) && not_startable "$code" "$logs/rank-0000.log" && code=2
    case $code in
        0)  say "finished at step $(newest_step)"; exit 0 ;;
        2)  say "cannot go on, and a restart would not help:" ;;
        89) say "a device, its memory or the network gave a wrong result; the newest checkpoint is" \
                "of step $(newest_step):"
            ending "$logs/rank-0000.log"
            requeue "$([[ -s $M3I_BAD_NODES ]] && sort -u "$M3I_BAD_NODES" | paste -sd,)" ;;
        85) say "was asked to stop and has saved step $(newest_step)"; requeue ;;
        *)  say "failed with exit code $1; the newest checkpoint is of step $(newest_step)"
            name_first_failure ;;
    esac
    ending "$logs/rank-0000.log"
    (( code == 2 )) && exit 2
    requeue
}

# Name the task that srun reports first, before rank 0's words: those may be about the loss of it.
name_first_failure() {
    local first rank
    first=$(grep -m 1 -E 'task[s]? [0-9]' "$logs/srun.log")
    if [[ $first =~ task[s]?\ ([0-9]+) ]]; then
        rank=${BASH_REMATCH[1]}
        say "rank $rank failed first (${first#srun: error: }); its words are in" \
            "$logs/rank-$(printf %04d "$rank").log"
        (( rank == 0 )) || say "what rank 0 says now may follow from that:"
    fi
}

# requeue [NODES]: start this job again, from its newest checkpoint, not on NODES; does not return.
requeue() {
    local job excluded
    job=$(scontrol show job -o "$SLURM_JOB_ID")
    # Slurm may have requeued or cancelled it already. And the script of an attempt whose node was
    # declared dead may outlive that attempt: the job is then no longer its own to requeue.
    if [[ $job != *" JobState=RUNNING "* || $job != *" Restarts=$restart "* ]]; then
        say "Slurm has already ended this attempt"
        exit 85
    fi
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "cannot be requeued here; submit it again and it will go on from step $(newest_step)"
        exit 1
    fi
    if [[ -n ${1:-} ]]; then  # only now, because a running job's list cannot be changed
        excluded=$(sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' <<< "$job")
        [[ $excluded == "(null)" ]] && excluded= || excluded+=,
        say "will not run on $1 again"
        scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded$1"
    fi
    exit 85
}
