# NVIDIA GPUs, for meshes with a model axis: matrix products in pieces that overlap with
# the communication of others, made by the compiler; the alternative to the rings of
# gin_configs/meshes/activations_2d_async.gin. To be read by the shell,
#
#   . gin_configs/launch/gpu_windowed.sh && vit22b train ...

# Products behind an all-gather and before a reduce-scatter are cut into pieces.
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_threshold_for_windowed_einsum_mib=0"
# The pieces run on several streams.
XLA_FLAGS="${XLA_FLAGS-} --xla_gpu_multi_streamed_windowed_einsum=true"
export XLA_FLAGS
