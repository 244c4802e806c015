#!/usr/bin/env bash
# Images from a transformer and its VQGAN. One rank per GPU; without GPUs, one per task.
#
#   sbatch [--nodes=4 ...] slurm/sample.sh transformer=EXPORT vqgan=EXPORT out=DIR n=50000 [key=value ...]
#
# The ranks share the images out through the folder out, which all nodes must see; run again, the same
# command makes only what is missing, and the job requeues itself until nothing is. Also as a job
# array: --array=0-63. See docs/sampling.md.
#SBATCH --job-name=sample
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@60

root=${TAMING_DIST:-${SLURM_SUBMIT_DIR:-$PWD}} # sbatch runs a copy of this file from elsewhere
if [[ ! -f $root/slurm/environment.sh ]]; then
    echo "error: $root is not taming_dist: submit from the repository, or set TAMING_DIST to it" >&2
    exit 2
fi
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh"

# A rank that fails leaves the others at work: what they finish stays finished.
until_finished launch --kill-on-bad-exit=0 "${container[@]}" python -m taming_dist.sample "$@"
