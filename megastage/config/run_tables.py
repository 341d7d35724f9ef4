"""The tables that say how the run is carried out: logs, layout, checkpoints, recomputation, kernels."""

from __future__ import annotations

from typing import Literal

from megastage.config.keys import MAX_SEED, Backend, FiniteFloat, RecomputeMode, Section, StringLists, Strings, key


class Job(Section):
    """The job as a whole."""

    config_file: str | None = key(None, "This file; --config is short for it")
    dump_folder: str = key("./outputs", "Folder that receives everything the job writes")
    description: str = key("default job", "What the job is for")
    use_for_integration_test: bool = key(False, "Mark of the job's use; changes nothing in the run")
    print_config: bool = key(False, "Print the resolved configuration at start-up")
    save_config_file: str | None = key(None, "File under dump_folder that receives the resolved configuration")
    custom_config_module: str = key("", "Python module that extends the configuration")


class Profiling(Section):
    """Traces of the profiler and of memory."""

    enable_profiling: bool = key(False, "Write torch.profiler traces")
    save_traces_folder: str = key("profile_traces", "Their folder under dump_folder")
    profile_freq: int = key(10, "Steps between traces", ge=1)
    profiler_active: int = key(1, "Steps recorded per trace", ge=1)
    profiler_warmup: int = key(3, "Steps of profiler warm-up before them", ge=0)
    enable_memory_snapshot: bool = key(False, "Write CUDA memory snapshots")
    save_memory_snapshot_folder: str = key("memory_snapshot", "Their folder under dump_folder")


class Metrics(Section):
    """Step lines and where else the figures go."""

    log_freq: int = key(10, "Steps between step lines", ge=1)
    enable_tensorboard: bool = key(False, "Write TensorBoard events (extra: tensorboard)")
    disable_color_printing: bool = key(False, "Plain text, no colours")
    save_tb_folder: str = key("tb", "Folder of the events under dump_folder")
    save_for_all_ranks: bool = key(False, "Every rank writes its figures, not rank 0 alone")
    per_source_loss: bool = key(True, "Also the training loss of each source, in every record")
    enable_wandb: bool = key(False, "Send figures to Weights & Biases (extra: wandb)")


class Parallelism(Section):
    """How the job's ranks are laid out."""

    data_parallel_replicate_degree: int = key(1, "Replicas of the sharded model", ge=1)
    data_parallel_shard_degree: int = key(-1, "Ranks a replica is sharded over; -1: all that are left")
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = key(
        "default", "Free gathered parameters after forward; default: unless pipelined"
    )
    tensor_parallel_degree: int = key(1, "Ranks that split every layer (with sequence parallelism)", ge=1)
    disable_loss_parallel: bool = key(
        False, "Whole vocabulary on every tensor-parallel rank, for its share of the positions"
    )
    enable_async_tensor_parallel: bool = key(False, "Overlap tensor-parallel communication (needs compile)")
    enable_compiled_autograd: bool = key(False, "Compile the backward graph")
    pipeline_parallel_degree: int = key(1, "Ranks the layers are spread over", ge=1)
    pipeline_parallel_split_points: Strings = key((), 'First layer of each later part, e.g. ["layers.8"]')
    module_fqns_per_model_part: StringLists | None = key(None, "Module names of each part; empty: as unset")
    pipeline_parallel_first_stage_less_layers: int = key(1, "Layers the embedding counts for", ge=0)
    pipeline_parallel_last_stage_less_layers: int = key(1, "Layers the output head counts for", ge=0)
    pipeline_parallel_layers_per_stage: int | None = key(None, "Layers per part", ge=1)
    pipeline_parallel_schedule: str = key("1F1B", "Pipeline schedule: 1F1B or GPipe")
    pipeline_parallel_schedule_csv: str = key("", "File that holds a schedule")
    pipeline_parallel_microbatch_size: int = key(1, "Rows of a micro-batch", ge=1)
    pipeline_parallel_expert_parallel_overlap: bool = key(True, "Overlap of expert and pipeline parallelism")
    context_parallel_degree: int = key(1, "Ranks that share one sequence", ge=1)
    context_parallel_load_balancer: Literal["headtail", "ptrr"] | None = key(
        "headtail", "How a sequence is dealt to context-parallel ranks"
    )
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = key(
        "allgather", "How keys and values travel between context-parallel ranks"
    )
    expert_parallel_degree: int = key(1, "Ranks that hold a share of the experts", ge=1)
    expert_tensor_parallel_degree: int = key(1, "Tensor parallelism inside experts", ge=1)
    expert_parallel_comm_backend: str = key("standard", "Communication of expert parallelism")


class Checkpoint(Section):
    """Saving and resuming."""

    enable: bool = key(False, "Save checkpoints, and resume from the newest good one")
    enable_ft_dataloader_checkpoints: bool = key(True, "Data position per replica group (fault tolerance)")
    folder: str = key("checkpoint", "Folder of the checkpoints under job.dump_folder")
    interval: int = key(500, "Steps between checkpoints", ge=1)
    initial_load_path: str | None = key(None, "Checkpoint to start from when the folder has none")
    initial_load_model_only: bool = key(True, "Take the model alone from initial_load_path")
    initial_load_in_hf: bool = key(False, "initial_load_path holds Hugging Face weights")
    initial_load_in_hf_quantized: bool = key(False, "These weights are quantized")
    last_save_model_only: bool = key(False, "The last checkpoint holds the model alone: the run can't be extended")
    last_save_in_hf: bool = key(False, "The last checkpoint is written as Hugging Face weights")
    export: str | None = key(None, "Folder that receives the final weights in Hugging Face format")
    export_dtype: Literal["float16", "bfloat16", "float32"] = key("float32", "Precision of exported weights")
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = key("disabled", "Write in the background")
    keep_latest_k: int = key(10, "Checkpoints to keep; 0: all", ge=0)
    load_step: int = key(-1, "Step to resume from; -1: the newest", ge=-1)
    exclude_from_loading: Strings = key((), "Parts not to load: optimizer, lr_scheduler, dataloader, train_state")
    enable_first_step_checkpoint: bool = key(False, "Also save after the first step")
    create_seed_checkpoint: bool = key(False, "Save the initial weights and stop (one process)")
    load_only: bool = key(False, "Load, but never save")


class ActivationCheckpoint(Section):
    """Recomputation of activations in backward."""

    mode: RecomputeMode = key("selective", "none, selective or full")
    selective_ac_option: str = key("2", 'Every n-th layer, or "op" for a choice by operation')
    per_op_sac_force_recompute_mm_shapes_by_fqns: Strings = key(
        ("moe.router.gate",), "Modules whose matrix products are always recomputed"
    )
    early_stop: bool = key(False, "Stop recomputing once everything needed is there")
    memory_budget: FiniteFloat = key(0.5, "Share of activations kept (mode memory_budget)", ge=0, le=1)
    visualize_memory_budget_pareto: bool = key(False, "Plot memory against recomputation")
    preserve_rng_state: bool = key(True, "Recompute with the random state of the forward pass")
    determinism_check: str = key("default", "Check of recomputed tensors: default or none")
    debug: bool = key(False, "Trace recomputation")


class Compile(Section):
    """torch.compile."""

    enable: bool = key(False, "Compile")
    components: Strings = key(("model", "loss"), "What is compiled: model, loss")
    backend: str = key("inductor", "Compiler back end")


class Comm(Section):
    """Communication between ranks."""

    init_timeout_seconds: int = key(300, "Timeout of collectives until a stage's first step is done", ge=1)
    train_timeout_seconds: int = key(100, "Timeout of collectives after it", ge=1)
    trace_buf_size: int = key(20_000, "Entries of the flight recorder", ge=0)
    save_traces_folder: str = key("comm_traces", "Folder of its dumps under dump_folder")
    save_traces_file_prefix: str = key("rank_", "First part of their names")
    mode: Literal["default", "fake_backend", "local_tensor"] = key("default", "Real communication, or a stand-in")


class MemoryEstimation(Section):
    """Estimate of memory before training."""

    enable: bool = key(False, "Estimate memory and stop")
    disable_fake_mode: bool = key(False, "Estimate with real tensors")


class Debug(Section):
    """Reproducibility."""

    seed: int | None = key(None, "Seed of the run; unset: drawn, shown and saved", ge=0, le=MAX_SEED)
    deterministic: bool = key(False, "Deterministic algorithms only")
    deterministic_warn_only: bool = key(False, "Warn where there is none, instead of failing")
    moe_force_load_balance: bool = key(False, "Equal load on every expert")


class Kernels(Section):
    """Back end of each operation: auto (Triton on CUDA, PyTorch elsewhere), triton or torch."""

    flash_attention: Backend = key("auto", "Attention")
    rms_norm: Backend = key("auto", "RMSNorm")
    rope: Backend = key("auto", "Rotary embedding")
    swiglu: Backend = key("auto", "Gated feed-forward activation")
    linear_cross_entropy: Backend = key("auto", "Output head and loss")
    optimizer: Backend = key("auto", "AdamW and gradient norm")
