#!/usr/bin/env bash
# The whole chain as Slurm jobs, each of which waits for those that it needs:
#
#   stage 1 ----------+-- tokenization, train --+-- stage 2 --+-- samples
#   condition stage --+-- tokenization, val ----+             +-- evaluation of stage 2
#                     +-- evaluation of stage 1
#
#   slurm/pipeline.sh slurm/chain_flickr.sh     on a login node: submits the jobs and prints their ids
#
# The file says what: plain bash that sets some of the variables below. A job that Slurm stops goes on
# by itself and keeps its id, so that the others wait for it. If one fails, those that need it are
# cancelled; after the fix the same command makes what is missing. See docs/operations.md.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ $# == 1 && -f $1 ]] || fail "give the file of a chain, such as slurm/chain_flickr.sh"
root=$(dirname "$(dirname "$(readlink -f "$0")")")
export TAMING_DIST=$root

images=             # image shards, in train/ and val/ below it
out=outputs/chain   # gets everything, in folders of their own
stage1=()           # overrides of taming_dist.train, such as (+experiment=flickr)
condition=()        # those of the condition's stage; (): there is none
stage2=()           # those of the transformer
views=center        # crops of each training image, for its codes
tokenize=()         # further options of tools/tokenize_dataset.py
workers=1           # jobs that share the tokenization of the training images
sample=()           # overrides of taming_dist.sample, such as (n=64 top_k=100)
evaluate=()         # overrides of taming_dist.evaluate
wandb=              # auto, online or offline: W&B of tokenization and samples, too; disabled: none
group=              # what W&B groups the runs of the chain by; out unless set
options=()          # sbatch's for all jobs, such as (--partition=gpu --account=me)
training_options=() # further ones for the training jobs, such as (--nodes=4)
# shellcheck source=slurm/chain_flickr.sh
source "$(readlink -f "$1")"
[[ -n $images ]] || fail "$1: set images="

tell=(log.group="${group:-$out}") told=()
if [[ -n $wandb ]]; then
    tell+=(log.wandb="$wandb")
    told=(--wandb "$wandb" --wandb-group "${group:-$out}")
fi

jobs=()
# submit NAME NEEDED-JOBS SBATCH-ARGUMENT...: submit a job; its id is then in `job`.
submit() {
    local name=$1 needed=$2 after=()
    shift 2
    [[ -z $needed ]] || after=(--dependency="afterok:$needed" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable --job-name="$name" "${options[@]}" "${after[@]}" "$@") || {
        ((${#jobs[@]} == 0)) || scancel "${jobs[@]}"
        fail "sbatch has refused $name (see above): the jobs before it are cancelled"
    }
    job=${job%%;*} # the rest is the cluster's name
    jobs+=("$job")
    printf '%-19s job %s%s\n' "$name" "$job" "${needed:+, after ${needed//:/, }}"
}

submit stage1 "" "${training_options[@]}" "$root/slurm/train_vqgan.sh" "${tell[@]}" "${stage1[@]}" \
    data.train="$images/train" data.val="$images/val" run.dir="$out/stage1"
first=$job needed=$job
models=(--model "$out/stage1/export")
vqgans=(data.vqgan="$out/stage1/export")
sampled=()
if ((${#condition[@]})); then
    submit condition "" "${training_options[@]}" "$root/slurm/train_vqgan.sh" "${tell[@]}" "${condition[@]}" \
        data.train="$images/train" data.val="$images/val" run.dir="$out/condition"
    needed+=:$job
    models+=(--condition-model "$out/condition/export")
    vqgans+=(data.condition_vqgan="$out/condition/export")
    sampled=(condition="$out/codes/val")
fi
submit evaluate_stage1 "$first" "$root/slurm/evaluate.sh" \
    model="$out/stage1/export" data="$images/val" out="$out/evaluation/stage1" "${evaluate[@]}"

submit tokenize_train "$needed" --array="0-$((workers - 1))" "$root/slurm/tokenize.sh" \
    "${models[@]}" --shards "$images/train" --out "$out/codes/train" --views "$views" \
    "${told[@]}" "${tokenize[@]}"
codes=$job
submit tokenize_val "$needed" "$root/slurm/tokenize.sh" \
    "${models[@]}" --shards "$images/val" --out "$out/codes/val" --prefix codes-val \
    "${told[@]}" "${tokenize[@]}"
codes+=:$job

submit stage2 "$codes" "${training_options[@]}" "$root/slurm/train_transformer.sh" "${tell[@]}" "${stage2[@]}" \
    data.train="$out/codes/train" data.val="$out/codes/val" "${vqgans[@]}" run.dir="$out/stage2"
second=$job
submit sample "$second" "$root/slurm/sample.sh" transformer="$out/stage2/export" \
    vqgan="$out/stage1/export" out="$out/samples" "${sampled[@]}" "${tell[@]}" "${sample[@]}"
submit evaluate_stage2 "$second" "$root/slurm/evaluate.sh" \
    model="$out/stage2/export" data="$out/codes/val" out="$out/evaluation/stage2" "${evaluate[@]}"

echo "squeue --me shows them. If one fails, Slurm cancels those that need it: slurm-NAME-JOB.out says why."
