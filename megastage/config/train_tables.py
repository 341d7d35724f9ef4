"""The tables that say what is trained, on which data and how: model, optimizer, lr_scheduler, training, validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megastage.config.keys import (
    MAX_COUNT,
    MAX_SEED,
    DatasetType,
    DecayType,
    FiniteFloat,
    Floats,
    RecomputeMode,
    Section,
    Strings,
    key,
)


class RopeScalingTable(Section):
    """How RoPE frequencies are changed to extend the context."""

    kind: Literal["none", "linear", "llama3", "yarn"] = key("none", '"none" switches an inherited scaling off')
    factor: FiniteFloat = key(1.0, "By how much the context grows", ge=1)
    original_max_positions: int = key(8192, "Context length in tokens trained at before", ge=1)
    low_freq_factor: FiniteFloat = key(1.0, "llama3 only: wavelengths above original/low are scaled fully", gt=0)
    high_freq_factor: FiniteFloat = key(4.0, "llama3 only: wavelengths below original/high are left alone", gt=0)
    beta_fast: FiniteFloat = key(32.0, "yarn only: rotations above which a frequency is left alone", gt=0)
    beta_slow: FiniteFloat = key(1.0, "yarn only: rotations below which a frequency is scaled fully", gt=0)
    attention_factor: FiniteFloat | None = key(
        None, "yarn only: attention temperature; unset: 0.1 ln(factor) + 1", gt=0
    )


class Model(Section):
    """The model: a named flavor, any of whose sizes may be overridden."""

    name: str = key("llama3", "Model family: llama3 or qwen3")
    flavor: str = key("debugmodel", "Named size of the family")
    hf_assets_path: str | None = key(None, "Tokenizer file, or folder that holds it (and the weights to start from)")
    converters: Strings = key((), "Model converters (float8, mx)")
    print_after_conversion: bool = key(False, "Print the model after its conversion")
    dim: int | None = key(None, "Override: width of the residual stream", ge=1)
    n_layers: int | None = key(None, "Override: number of layers", ge=1)
    n_heads: int | None = key(None, "Override: number of query heads", ge=1)
    n_kv_heads: int | None = key(None, "Override: number of key/value heads", ge=1)
    head_dim: int | None = key(None, "Override: elements per head; unset with dim or n_heads set: dim / n_heads", ge=1)
    ffn_dim: int | None = key(None, "Override: hidden width of the feed-forward layer", ge=1)
    vocab_size: int | None = key(None, "Override: number of token ids", ge=1)
    norm_eps: FiniteFloat | None = key(None, "Override: epsilon of RMSNorm", gt=0)
    qk_norm: bool | None = key(None, "Override: RMSNorm on queries and keys")
    tied_embeddings: bool | None = key(None, "Override: one matrix for embedding and output")
    rope_theta: FiniteFloat | None = key(None, "Override: base of the rotary embedding", gt=0)
    rope_scaling: RopeScalingTable | None = key(None, "Override: scaling of the rotary embedding")
    init_std: FiniteFloat | None = key(None, "Override: standard deviation of the initial weights", gt=0)


class Optimizer(Section):
    """The optimizer."""

    name: Literal["AdamW", "Adam"] = key("AdamW", "Optimizer")
    lr: FiniteFloat = key(8e-4, "Peak learning rate", ge=0)
    beta1: FiniteFloat = key(0.9, "Decay of the first moment", ge=0, lt=1)
    beta2: FiniteFloat = key(0.95, "Decay of the second moment", ge=0, lt=1)
    eps: FiniteFloat = key(1e-8, "Added to the root of the second moment", gt=0)
    weight_decay: FiniteFloat = key(0.1, "Decoupled weight decay", ge=0)
    implementation: Literal["fused", "foreach", "for-loop", "apex"] = key(
        "fused", "Implementation; apex needs NVIDIA Apex (apex.optimizers.FusedAdam)"
    )
    early_step_in_backward: bool = key(False, "Step each parameter inside backward")


class LrScheduler(Section):
    """Learning rate over the global step: warm-up, stable, decay."""

    warmup_steps: int = key(200, "Steps of linear warm-up", ge=0)
    total_steps: int | None = key(None, "Steps the schedule spans; unset: training.steps", ge=1)
    decay_ratio: FiniteFloat | None = key(None, "Share of the steps that decays; unset: all after warm-up", ge=0, le=1)
    decay_type: DecayType = key("linear", "Shape of the decay")
    min_lr_factor: FiniteFloat = key(0.0, "Floor of the decay as a share of the peak", ge=0, le=1)


class Dataloader(Section):
    """Threads that read and prepare batches ahead of training."""

    num_workers: int = key(0, "Reading threads per rank; 0: read in the training thread", ge=0)
    persistent_workers: bool = key(False, "Keep the workers between epochs (they are kept in any case)")
    pin_memory: bool = key(False, "Page-locked batches, for faster copies to a GPU")
    prefetch_factor: int | None = key(None, "Batches each worker prepares ahead", ge=1)


class DataStage(Section):
    """One stage of the run. A key left out comes from [training] (or from the table that owns it)."""

    name: str = key(..., "Stage identifier for logging")
    start_step: int = key(..., "Step when the stage begins (inclusive)", le=MAX_COUNT)
    end_step: int | None = key(None, "Step when the stage ends (exclusive); omit for the final stage", le=MAX_COUNT)
    dataset: str | None = key(None, "Dataset name")
    dataset_path: str | None = key(None, "Path to one dataset")
    dataset_type: DatasetType | None = key(None, "Kind of data")
    dataset_folders: Strings = key((), "Folders to blend; empty: inherit")
    dataset_weights: Floats = key((), "Weights for blending, one per folder, by rows; empty: inherit")
    dataset_random_seed: int | None = key(None, "Random seed of the data order", ge=0, le=MAX_SEED)
    seq_len: int | None = key(None, "Sequence length in tokens (for context extension)", ge=1, le=MAX_COUNT)
    local_batch_size: int | None = key(None, "Rows per data rank and accumulation step", ge=1, le=MAX_COUNT)
    global_batch_size: int | None = key(None, "Rows per optimizer step over the whole job", ge=1, le=MAX_COUNT)
    rope_theta: FiniteFloat | None = key(None, "Base of the rotary embedding", gt=0)
    rope_scaling: RopeScalingTable | None = key(None, "Scaling of the rotary embedding")
    context_parallel_degree: int | None = key(None, "Ranks that share one sequence", ge=1)
    document_mask: bool | None = key(None, "Attention isolated per document")
    recompute_mode: RecomputeMode | None = key(None, "As activation_checkpoint.mode, from this stage on its own")
    recompute_option: str | None = key(None, "As activation_checkpoint.selective_ac_option")
    lr: FiniteFloat | None = key(None, "Learning rate from here on; holds until a later stage says otherwise", ge=0)
    lr_end: FiniteFloat | None = key(None, "Learning rate at the stage's end, reached by decay", ge=0)
    lr_decay_type: DecayType | None = key(None, "Shape of that decay; unset: lr_scheduler.decay_type")
    lr_warmup_steps: int | None = key(None, "Steps of linear warm-up to lr at the stage's start", ge=0)
    weight_decay: FiniteFloat | None = key(None, "Weight decay from here on, until a later stage sets it", ge=0)
    reset_optimizer: bool = key(False, "Drop the optimizer's moments at the stage's start")
    min_doc_len: int | None = key(None, "Tokens below which a document is not read; 0: all are", ge=0)
    long_doc_len: int | None = key(None, "Tokens from which on a document is long; 0: no two kinds", ge=0)
    long_doc_share: FiniteFloat | None = key(None, "Share of rows made of long documents", ge=0, le=1)


class Training(Section):
    """Data, batch, length and precision of the run."""

    dataset: str = key("c4_test", "Dataset name (dataset_type huggingface)")
    dataset_path: str | None = key(None, "Path to one dataset")
    dataset_type: DatasetType = key("huggingface", "Kind of data")
    dataset_folders: Strings = key((), "Folders to blend")
    dataset_weights: Floats = key((), "Weights for blending, one per folder, by rows; empty: equal")
    dataset_random_seed: int | None = key(None, "Random seed of the data order; unset: the run's", ge=0, le=MAX_SEED)
    data_stages: Annotated[tuple[DataStage, ...], Field(strict=False)] = key((), "The stages of the run")
    document_mask: bool = key(True, "Attention isolated per document, positions restart there")
    min_doc_len: int = key(0, "Tokens below which a document is not read; 0: all are", ge=0)
    long_doc_len: int = key(0, "Tokens from which on a document is long; 0: no two kinds", ge=0)
    long_doc_share: FiniteFloat | None = key(None, "Share of rows made of long documents", ge=0, le=1)
    live_text_mb: int = key(256, "MB on disk above which text is tokenized while it is read, not before", ge=0)
    superblock_tokens: int | None = key(None, "Tokens of a shuffled block of a token stream; unset: chosen", ge=1)
    local_batch_size: int = key(8, "Rows per data rank and accumulation step", ge=1, le=MAX_COUNT)
    global_batch_size: int = key(
        -1, "Rows per optimizer step over the whole job; -1: local_batch_size x data ranks", le=MAX_COUNT
    )
    seq_len: int = key(2048, "Sequence length in tokens", ge=1, le=MAX_COUNT)
    rope_theta: FiniteFloat | None = key(None, "Base of the rotary embedding; unset: the model's", gt=0)
    rope_scaling: RopeScalingTable | None = key(None, "Scaling of the rotary embedding; unset: the model's")
    max_norm: float = key(1.0, "Gradient norm above which gradients are scaled down; inf: never", gt=0)
    steps: int = key(10_000, "Optimizer steps of the run", ge=1, le=MAX_COUNT)
    enable_cpu_offload: bool = key(False, "Keep parameters and optimizer state in host memory")
    dtype: Literal["float32", "bfloat16"] = key("float32", "Precision of the parameters as stored")
    mixed_precision_param: Literal["bfloat16", "float32"] = key("bfloat16", "Precision of the computation")
    mixed_precision_reduce: Literal["float32", "bfloat16"] = key("float32", "Precision of gradient reductions")
    gc_freq: int = key(50, "Steps between Python garbage collections", ge=1)
    gc_debug: bool = key(False, "Report what each garbage collection found")
    dataloader: Dataloader = key(Dataloader(), "Worker processes")


class Validation(Section):
    """Loss on held-out data."""

    enable: bool = key(False, "Validate during training")
    dataset: str = key("c4_validation", "Dataset name (huggingface)")
    dataset_path: str | None = key(None, "Path to the dataset")
    dataset_type: DatasetType | None = key(None, "Kind of data; unset: training.dataset_type")
    dataset_folders: Strings = key((), "Folders to validate on")
    local_batch_size: int = key(8, "Rows per data rank", ge=1, le=MAX_COUNT)
    seq_len: int = key(2048, "Sequence length in tokens", ge=1, le=MAX_COUNT)
    freq: int = key(10, "Steps between validations", ge=1)
    steps: int = key(-1, "Batches per validation; -1: all of the data", ge=-1)
    dataloader: Dataloader = key(Dataloader(), "Worker processes")
