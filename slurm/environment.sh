# shellcheck shell=bash
# What the job scripts share. They set `root`, the repository, and source this file.
: "${root:?}"
set -euo pipefail

# ---- What a site sets ---------------------------------------------------------------------------
# The python of the ranks: .venv of the repository if there is one, else that of sbatch's environment.
if [[ -f $root/.venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
fi
# Or switch one of these lines on:
# module load python/3.11 cuda/12.4
# source /shared/venv/bin/activate
container=()    # the ranks run in it, such as Apptainer's: (apptainer exec --nv /shared/image.sif)
srun_options=() # such as Pyxis': (--container-image=/shared/image.sqsh --container-mounts=/shared)

# So many restarts in a row that come no further than the one before end a job: it fails.
restarts_without_progress=3
# -------------------------------------------------------------------------------------------------

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a Slurm job: start it with sbatch"
((${#srun_options[@]})) || "${container[@]}" python -c 'import taming_dist' 2>/dev/null ||
    fail "no python with taming_dist: run 'make env' in $root, or see $root/slurm/environment.sh"

# How srun cuts the allocation into tasks. srun does not take over sbatch's --cpus-per-task.
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    # One task per GPU, even if --ntasks-per-node differs: nobody wants an idle GPU, or two ranks on
    # one. The node's CPUs are divided among them.
    cpus=$((SLURM_CPUS_ON_NODE > gpus ? SLURM_CPUS_ON_NODE / gpus : 1))
    layout=(--ntasks="$((gpus * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$gpus")
else
    cpus=${SLURM_CPUS_PER_TASK:-1}
    layout=(--ntasks="$SLURM_NTASKS")
    # glibc gives big tensors back to the system after each use; an encoder runs faster when it
    # keeps them (docs/speed.md).
    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
fi
layout+=(--cpus-per-task="$cpus")
export OMP_NUM_THREADS=$cpus

# The ranks meet on the first node, at a port that other jobs on it do not use, below the ephemeral
# ports.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# launch [SRUN-OPTION...] COMMAND...: a task per rank, each with this shell's environment even where
# sbatch was told --export=NONE; ends with srun's status.
launch() {
    srun --export=ALL "${layout[@]}" "${srun_options[@]}" "$@"
}

# train EXPERIMENT OVERRIDE...: train EXPERIMENT, unless an override names another one. A rank that
# fails takes the others with it: they would wait for it in vain.
train() {
    local experiment=("+experiment=$1") override
    shift
    for override in "$@"; do
        [[ $override != ?(+)experiment=* ]] || experiment=()
    done
    launch --kill-on-bad-exit=1 "$root/slurm/rank.sh" \
        "${container[@]}" python -m taming_dist.train "${experiment[@]}" "$@"
}

# until_finished COMMAND...: end this job as COMMAND ends, or have Slurm start it again, as often as
# it takes. A requeued job keeps its id, its command and its output; jobs that depend on it wait.
#
#   COMMAND is finished                                                    so is the job
#   it was refused (status 2: a mistyped key, a full disk)                 so is the job
#   stopped: Slurm's warning, preemption (TERM), the time limit            again
#   crashed: a rank was killed, a GPU or a node has failed                 again
#   cancelled, or asked to save and end by scancel --signal=INT            not again
#
# COMMAND writes how it has ended, one line of JSON, to slurm-ID.end where the job was submitted;
# slurm-ID.restarts has the images seen until then, and how many restarts came no further.
until_finished() {
    local file=$PWD/slurm-$SLURM_JOB_ID status=0 end="" why
    ((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$file.end" "$file.restarts"
    trap : TERM # Slurm sends it to this shell too, which has to outlive the ranks
    TAMING_DIST_END=$file.end "$@" || status=$?

    [[ ! -f $file.end ]] || end=$(<"$file.end")
    why="ended with status $status"
    if ((status == 0)); then
        why=finished
        [[ $end == *'"finished": true'* || ! $end =~ \"reason\":\ \"([^\"]*) ]] ||
            why=${BASH_REMATCH[1]}
    fi
    case $status-$why in
        0-finished | 2-*) rm -f "$file.end" "$file.restarts" ;;
        0-*SIGINT) echo "not requeued ($why): the same command resumes" && exit 130 ;;
        *) requeue "$why" "$end" "$file.restarts" ;;
    esac
    exit "$status"
}

# requeue WHY END FILE: have Slurm start this job again, unless somebody has ended it or that would
# be in vain. END and FILE: see until_finished.
requeue() {
    local why=$1 end=$2 file=$3 job=$SLURM_JOB_ID shown images=0 best=0 restarts=-1
    trap '' TERM # which Slurm sends to a job that is requeued, scontrol below included
    # the id of an array's last task is that of the whole array
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    until shown=$(scontrol --oneliner show job "$job"); do
        sleep 10 # the controller may be starting again
    done
    # else it was cancelled, or Slurm has put it back into the queue by itself
    [[ $shown =~ JobState=RUNNING|Reason=TimeLimit ]] || exit 0

    [[ ! $end =~ \"images\":\ ([0-9]+) ]] || images=${BASH_REMATCH[1]}
    [[ ! -f $file ]] || read -r best restarts <"$file"
    if ((images > best)); then
        best=$images restarts=0
    else
        restarts=$((restarts + 1))
    fi
    if ((restarts >= restarts_without_progress)); then
        echo "error: given up after $restarts restarts without progress at $best images ($why)" >&2
        exit 1
    fi
    echo "$best $restarts" >"$file"
    echo "requeued ($why): this job continues when Slurm starts it again"
    scontrol requeue "$job" && exit 0
    echo "error: not requeued (sbatch --no-requeue?): the same command resumes" >&2
    exit 1
}
