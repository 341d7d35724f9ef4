"""The whole configuration: one frozen model per TOML table, under canonical names.

Names and defaults are those of TorchTitan's TOML interface, so that existing files load; where its two generations
of names differ, the canonical name is the second's and `aliases.ALIASES` maps the first's onto it.
"""

from __future__ import annotations

from typing import Any

from megastage.config.keys import Section, key
from megastage.config.run_tables import (
    ActivationCheckpoint,
    Checkpoint,
    Comm,
    Compile,
    Debug,
    Job,
    Kernels,
    MemoryEstimation,
    Metrics,
    Parallelism,
    Profiling,
)
from megastage.config.train_tables import (
    Dataloader,
    DataStage,
    LrScheduler,
    Model,
    Optimizer,
    RopeScalingTable,
    Training,
    Validation,
)
from megastage.config.unbuilt_tables import Experimental, FaultTolerance, Float8, Mx, Quantize

__all__ = [
    "ActivationCheckpoint",
    "Checkpoint",
    "Comm",
    "Compile",
    "Config",
    "DataStage",
    "Dataloader",
    "Debug",
    "Experimental",
    "FaultTolerance",
    "Float8",
    "Job",
    "Kernels",
    "LrScheduler",
    "MemoryEstimation",
    "Metrics",
    "Model",
    "Mx",
    "Optimizer",
    "Parallelism",
    "Profiling",
    "Quantize",
    "RopeScalingTable",
    "Training",
    "Validation",
]


class Config(Section):
    """What the user wrote, completed by defaults and never changed afterwards."""

    job: Job = key(Job(), "The job as a whole")
    profiling: Profiling = key(Profiling(), "Traces of the profiler and of memory")
    metrics: Metrics = key(Metrics(), "Step lines and where else the figures go")
    model: Model = key(Model(), "The model")
    optimizer: Optimizer = key(Optimizer(), "The optimizer")
    lr_scheduler: LrScheduler = key(LrScheduler(), "Learning rate over the global step")
    training: Training = key(Training(), "Data, batch, length and precision of the run")
    parallelism: Parallelism = key(Parallelism(), "How the job's ranks are laid out")
    checkpoint: Checkpoint = key(Checkpoint(), "Saving and resuming")
    activation_checkpoint: ActivationCheckpoint = key(ActivationCheckpoint(), "Recomputation of activations")
    float8: Float8 = key(Float8(), "Float8 training (not built)")
    mx: Mx = key(Mx(), "Microscaling formats (not built)")
    comm: Comm = key(Comm(), "Communication between ranks")
    memory_estimation: MemoryEstimation = key(MemoryEstimation(), "Estimate of memory before training")
    fault_tolerance: FaultTolerance = key(FaultTolerance(), "Replica groups that come and go (not built)")
    experimental: Experimental = key(Experimental(), "Extension points (not built)")
    compile: Compile = key(Compile(), "torch.compile")
    quantize: Quantize = key(Quantize(), "Quantized training (not built)")
    validation: Validation = key(Validation(), "Loss on held-out data")
    debug: Debug = key(Debug(), "Reproducibility")
    kernels: Kernels = key(Kernels(), "Back end of each operation")

    def is_set(self, path: str) -> bool:
        """Whether the user wrote the key at `path` ("training.seq_len"), in the file or on the command line."""
        node: Section = self
        *tables, leaf = path.split(".")
        for table in tables:
            if table not in node.model_fields_set:
                return False
            node = getattr(node, table)
        return leaf in node.model_fields_set

    def value(self, path: str) -> Any:
        """The value of the key at `path` ("training.seq_len")."""
        node: Any = self
        for name in path.split("."):
            node = getattr(node, name)
        return node
