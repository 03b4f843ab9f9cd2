# NVIDIA GPUs, flag by flag, for models split over several: to be read by the shell,
#
#   . gin_configs/launch/gpu_overlap.sh && vit22b train ...
#
# `vit22b bench --compare-settings` measures it on your device.

# Of the GPU's memory, what JAX takes at its start (default 0.75).
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
# Kernels start in the order in which they were queued, which overlap needs (Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Sums across the GPUs of a node are made by NVLink's switches.
export NCCL_NVLS_ENABLE=1

# Orders operations so that communication runs beside computation.
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_enable_latency_hiding_scheduler=true"
# Gradients of several layers are summed together; at least the bytes of one layer.
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_all_reduce_combine_threshold_bytes=134217728"
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_all_gather_combine_threshold_bytes=134217728"
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864"
# The parameters of the next scanned layer come while this one computes.
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_enable_while_loop_double_buffering=true"
export XLA_FLAGS
