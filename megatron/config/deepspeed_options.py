"""The options that a run hands on to DeepSpeed: those that are numbers, switches and words to it.

Its JSON has others, whose values name classes and modules that it imports, files that it writes,
and services that it calls, each with a package of its own. So what is not listed is refused.
"""

import math
from collections.abc import Sequence
from typing import Any

_ZERO_SWITCHES = (
    "allgather_partitions",
    "contiguous_gradients",
    "elastic_checkpoint",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "legacy_stage1",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
_ZERO_NUMBERS = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "stage",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "zero_hpz_partition_size",
)
_OFFLOAD_SWITCHES = ("pin_memory", "pipeline_read", "pipeline_write", "fast_init")
_OFFLOAD_NUMBERS = ("buffer_count", "buffer_size", "max_in_cpu", "ratio")
_OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_DTYPES = ("fp32", "fp16", "bf16")

_SWITCHES = {
    "aio.overlap_events",
    "aio.single_submit",
    "aio.use_gds",
    "bf16.check_grad_overflow",
    "bf16.enabled",
    "bf16.immediate_grad_update",
    "comms_logger.debug",
    "comms_logger.enabled",
    "comms_logger.prof_all",
    "comms_logger.verbose",
    "disable_allgather",
    "dump_state",
    "flops_profiler.detailed",
    "flops_profiler.enabled",
    "fp16.auto_cast",
    "fp16.consecutive_hysteresis",
    "fp16.enabled",
    "memory_breakdown",
    "pipeline.grad_partitioned",
    "pipeline.pipe_partitioned",
    "pipeline.use_reentrant",
    "prescale_gradients",
    "sparse_gradients",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    *(f"zero_optimization.{name}" for name in _ZERO_SWITCHES),
    *(f"{section}.{name}" for section in _OFFLOADS for name in _OFFLOAD_SWITCHES),
}
_NUMBERS = {
    "aio.block_size",
    "aio.intra_op_parallelism",
    "aio.queue_depth",
    "flops_profiler.module_depth",
    "flops_profiler.profile_step",
    "flops_profiler.recompute_fwd_factor",
    "flops_profiler.top_modules",
    "fp16.hysteresis",
    "fp16.initial_scale_power",
    "fp16.loss_scale",
    "fp16.loss_scale_window",
    "fp16.min_loss_scale",
    "gradient_clipping",
    "gradient_predivide_factor",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    *(f"zero_optimization.{name}" for name in _ZERO_NUMBERS),
    *(f"{section}.{name}" for section in _OFFLOADS for name in _OFFLOAD_NUMBERS),
}
_WORDS: dict[str, Sequence[str]] = {
    "communication_data_type": _DTYPES,
    "data_types.grad_accum_dtype": _DTYPES,
    "gradient_allreduce_op": ("mean", "sum"),
    "seq_parallel_communication_data_type": _DTYPES,
    **{f"{section}.device": ("none", "cpu", "nvme") for section in _OFFLOADS},
}
_FOLDERS = {f"{section}.nvme_path" for section in _OFFLOADS}


def rule_for(name: str, value: Any) -> str | None:
    """What ``value`` breaks as the option ``name``, which is dotted; None if nothing."""
    if name in _SWITCHES:
        return None if isinstance(value, bool) else "must be true or false"
    if name in _NUMBERS:
        # "auto" is what other programs fill in, and DeepSpeed's own default for some.
        number = type(value) in (int, float) and math.isfinite(value)
        return None if number or value == "auto" else "must be a number"
    if name in _WORDS:
        return None if value in _WORDS[name] else f"must be one of {', '.join(_WORDS[name])}"
    if name in _FOLDERS:
        return None if isinstance(value, str) and value else "must be a path"
    return "must not be given: it is none of the options that a run hands on to DeepSpeed"
