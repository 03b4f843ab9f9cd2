#!/bin/bash
# Predicts a split under Slurm with 8 independent jobs of one GPU each.
#
#   sbatch gin_configs/launch/slurm_array.sh
#
# Each job writes its own part of OUTPUT, which must lie where all nodes see it; a job that
# is cancelled, or put back into the queue, goes on where it was. The one that finishes
# last merges all; `vit22b merge OUTPUT` does so, too.
#SBATCH --job-name=vit22b-infer
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --requeue
set -eu

OUTPUT=$HOME/runs/coco/test2015.jsonl
vit22b infer "$HOME/runs/coco" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
  --gin.OUTPUT="'$OUTPUT'"
