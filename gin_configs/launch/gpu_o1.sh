# NVIDIA GPUs, the compiler's own bundle: to be read by the shell before a command,
#
#   . gin_configs/launch/gpu_o1.sh && vit22b train ...
#
# `vit22b bench --compare-settings` measures it on your device.

# Overlaps communication with computation: latency hiding, pipelined all-gather,
# reduce-scatter and all-reduce, loops with two buffers.
export JAX_OPTIMIZATION_LEVEL=O1
