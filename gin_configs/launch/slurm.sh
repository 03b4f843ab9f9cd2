#!/bin/bash
# Fine-tunes on 2 nodes of 8 GPUs under Slurm: a process for each GPU.
#
#   sbatch gin_configs/launch/slurm.sh
#
# JAX learns from Slurm who takes part. MODEL_DIR must lie where all nodes see it. The
# same file runs `vit22b eval` and `vit22b infer`. Before its time is over the job is
# told to stop, and saves; submitted again it goes on.
#SBATCH --job-name=vit22b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue

# When a process fails, the others are ended at once, not when they notice it.
srun --kill-on-bad-exit=1 \
  vit22b train --distributed \
  --gin_file=gin_configs/recipes/coco_captions.gin \
  --gin_file=gin_configs/meshes/fsdp.gin \
  --gin.MODEL_DIR="'$HOME/runs/coco'"
