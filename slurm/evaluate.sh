#!/usr/bin/env bash
# The metrics of an export. One rank per GPU; without GPUs, one per task.
#
#   sbatch slurm/evaluate.sh model=EXPORT data=SPEC out=DIR [key=value ...]
#   sbatch --gpus-per-node=0 --cpus-per-task=16 slurm/evaluate.sh model=EXPORT data=SPEC out=DIR
#
# It begins anew when Slurm starts it again. See docs/operations.md.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

root=${TAMING_DIST:-${SLURM_SUBMIT_DIR:-$PWD}} # sbatch runs a copy of this file from elsewhere
if [[ ! -f $root/slurm/environment.sh ]]; then
    echo "error: $root is not taming_dist: submit from the repository, or set TAMING_DIST to it" >&2
    exit 2
fi
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh"

until_finished launch "${container[@]}" python -m taming_dist.evaluate "$@"
