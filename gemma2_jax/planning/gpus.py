"""Descriptions of GPUs that XLA compiles for without having them: the text of a GpuTargetConfig."""

from gemma2_jax.chips import Chip

# Device name, number of multiprocessors, bytes of shared memory per block (opt-in) and per multiprocessor, bytes of L2
# cache, clock in GHz, compute capability. Sources: NVIDIA's CUDA programming guide (compute capabilities 8.0, 9.0,
# 10.0) and architecture white papers.
_HARDWARE = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108, 166_912, 167_936, 41_943_040, 1.41, (8, 0)),
    "h100": ("NVIDIA H100 80GB HBM3", 132, 232_448, 233_472, 52_428_800, 1.98, (9, 0)),
    "h200": ("NVIDIA H200", 132, 232_448, 233_472, 62_914_560, 1.98, (9, 0)),
    "b200": ("NVIDIA B200", 148, 232_448, 233_472, 132_644_864, 1.965, (10, 0)),
}


def target_config(kind: str, chip: Chip) -> str:
    """Returns the text proto of a GPU: GpuTargetConfigProto in xla/stream_executor/device_description.proto."""
    name, cores, block_memory, core_memory, cache, clock, (major, minor) = _HARDWARE[kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {block_memory} shared_memory_per_core: {core_memory}
  core_count: {cores} fpus_per_core: {64 if kind == "a100" else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {int(chip.memory_bandwidth)} device_memory_size: {chip.memory}
  l2_cache_size: {cache} clock_rate_ghz: {clock}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
