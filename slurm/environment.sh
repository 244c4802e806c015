# shellcheck shell=bash
# What the job scripts share. They set `root`, the repository, and source this file.
: "${root:?}"

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a Slurm job: start it with sbatch"

if [[ -f $root/.venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
fi
python -c 'import taming_dist' 2>/dev/null ||
    fail "no python with taming_dist: run 'make env' in $root, or activate yours before sbatch"

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
    # keeps them (docs/results.md).
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
    srun --export=ALL "${layout[@]}" "$@"
}

# train EXPERIMENT OVERRIDE...: train EXPERIMENT, unless an override names another one. A rank that
# fails takes the others with it: they would wait for it in vain.
train() {
    local experiment=("+experiment=$1") override
    shift
    for override in "$@"; do
        [[ $override != *(+)experiment=* ]] || experiment=()
    done
    launch --kill-on-bad-exit=1 "$root/slurm/rank.sh" \
        python -m taming_dist.train "${experiment[@]}" "$@"
}
