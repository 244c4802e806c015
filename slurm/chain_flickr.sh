# shellcheck shell=bash disable=SC2034
# A chain for slurm/pipeline.sh: landscapes from label maps, the paper's figure 4. Each image of the
# shards has a .seg.png (tools/make_shards.py --segmentations). For unconditional images leave
# `condition` out, with +experiment=flickr_transformer as stage 2.
images=data/flickr
out=outputs/flickr_chain
stage1=(+experiment=flickr)
condition=(+experiment=flickr_segmentation)
stage2=(+experiment=flickr_segmentation_transformer)
views=flip
workers=8
sample=(n=64 top_k=100)
# options=(--partition=gpu --account=me --gpus-per-node=4 --ntasks-per-node=4)
# training_options=(--nodes=4)
