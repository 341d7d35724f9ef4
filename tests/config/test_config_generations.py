"""TOML files of both generations load, resolve and plan; every documented key has its documented default."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from config_key_lists import FIRST, SECOND

from megastage.config.aliases import ALIASES
from megastage.config.errors import show
from megastage.config.fields import all_keys
from megastage.config.layout import resolve_layout
from megastage.config.load import load_config
from megastage.config.schema import Config
from megastage.stages import plan_text, resolve_stages

DEVIATIONS = {"checkpoint.last_save_model_only": False}


def documented(text: str) -> dict[str, object]:
    """`section.key` -> default of a key list; keys whose default isn't given as a value are left out."""
    keys: dict[str, object] = {}
    for table in re.split(r"\n(?=\[)", text.strip()):
        name, body = re.fullmatch(r"\[(\w+)\] (.*)", table, re.S).groups()
        for entry in body.replace("\n", " ").split(";"):
            if not entry.strip():
                continue
            key, value = (part.strip() for part in entry.split("=", 1))
            if not value.startswith("("):
                keys[f"{name}.{key}"] = ast.literal_eval(value)
    return keys


@pytest.mark.parametrize(("text", "count"), [(FIRST, 100), (SECOND, 120)], ids=["first", "second"])
def test_every_documented_default(text: str, count: int) -> None:
    keys = documented(text)
    assert len(keys) > count
    defaults = {path: info.default for path, info in all_keys().items()}
    for path, expected in keys.items():
        name = ALIASES.get(path, path)
        actual = defaults[name]
        actual = list(actual) if isinstance(actual, tuple) else actual
        if expected == [] and actual is None:
            continue
        assert actual == DEVIATIONS.get(name, expected), path
        assert type(actual) is type(DEVIATIONS.get(name, expected)), path


@pytest.mark.parametrize("text", [FIRST, SECOND], ids=["first", "second"])
def test_a_file_of_all_defaults_loads(text: str, tmp_path: Path) -> None:
    """A file that writes out every key at its documented default changes nothing."""
    tables: dict[str, list[str]] = {}
    for path, value in documented(text).items():
        table, key = path.split(".")
        if value is not None:
            tables.setdefault(table, []).append(f"{key} = {show(value)}")
    file = tmp_path / "all.toml"
    file.write_text("\n".join(f"[{table}]\n" + "\n".join(lines) for table, lines in tables.items()))
    cfg = load_config(["--config", str(file)], world_size=1)
    ours, default = cfg.model_dump(), Config().model_dump()
    ours["job"]["config_file"] = None
    ours["checkpoint"]["last_save_model_only"] = False
    assert ours == default


FIRST_TEMPLATE = """
[job]
dump_folder = "./outputs"
description = "{description}"
print_args = false
[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
profile_freq = 100
[metrics]
log_freq = 10
enable_tensorboard = true
save_tb_folder = "tb"
[model]
name = "llama3"
flavor = "{flavor}"
tokenizer_path = "./assets/tokenizer/original/tokenizer.model"
converters = []
[optimizer]
name = "AdamW"
lr = {lr}
eps = 1e-8
[lr_scheduler]
warmup_steps = {warmup}
lr_min = 0.1
[training]
local_batch_size = {local}
seq_len = {seq_len}
max_norm = 1.0
steps = {steps}
compile = {compile}
dataset = "c4"
seed = 7
[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = {tp}
pipeline_parallel_degree = {pp}
context_parallel_degree = 1
[checkpoint]
enable_checkpoint = true
folder = "checkpoint"
interval = 500
last_save_model_weights_only = false
initial_load_model_weights_only = true
export_dtype = "float32"
async_mode = "disabled"
[activation_checkpoint]
mode = "{ac}"
selective_ac_option = "op"
[memory_estimation]
enabled = false
[float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]
"""

SECOND_TEMPLATE = """
[job]
dump_folder = "./outputs"
description = "{description}"
print_config = false
[profiling]
enable_profiling = false
save_traces_folder = "profile_trace"
profile_freq = 100
profiler_warmup = 3
[metrics]
log_freq = 10
enable_tensorboard = true
[model]
name = "llama3"
flavor = "{flavor}"
hf_assets_path = "./assets/hf/Llama"
converters = []
[optimizer]
name = "AdamW"
lr = {lr}
eps = 1e-8
[lr_scheduler]
warmup_steps = {warmup}
decay_ratio = 0.8
decay_type = "cosine"
min_lr_factor = 0.1
[training]
local_batch_size = {local}
seq_len = {seq_len}
steps = {steps}
dataset = "c4"
[training.dataloader]
num_workers = 2
pin_memory = true
[parallelism]
tensor_parallel_degree = {tp}
pipeline_parallel_degree = {pp}
pipeline_parallel_schedule = "1F1B"
context_parallel_load_balancer = "headtail"
[checkpoint]
enable = true
interval = 500
last_save_model_only = true
initial_load_in_hf = false
export_dtype = "bfloat16"
async_mode = "async"
[compile]
enable = {compile}
components = ["model", "loss"]
[activation_checkpoint]
mode = "{ac}"
selective_ac_option = "op"
[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]
[validation]
enable = false
dataset = "c4_validation"
freq = 5
steps = 10
[debug]
seed = 7
deterministic = true
"""

SIZES = {
    "debug": (
        {"flavor": "debugmodel", "lr": 8e-4, "warmup": 2, "local": 8, "seq_len": 2048, "steps": 10, "tp": 1, "pp": 1,
         "compile": "false", "ac": "none"},
        2, 16,
    ),
    "8B": (
        {"flavor": "8B", "lr": 3e-4, "warmup": 200, "local": 1, "seq_len": 8192, "steps": 1000, "tp": 1, "pp": 1,
         "compile": "false", "ac": "selective"},
        8, 8,
    ),
    "70B": (
        {"flavor": "70B", "lr": 1.5e-4, "warmup": 200, "local": 8, "seq_len": 8192, "steps": 1000, "tp": 8, "pp": 1,
         "compile": "false", "ac": "full"},
        256, 256,
    ),
    "405B": (
        {"flavor": "405B", "lr": 8e-5, "warmup": 600, "local": 16, "seq_len": 8192, "steps": 3000, "tp": 8, "pp": 16,
         "compile": "true", "ac": "full"},
        512, 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("template", [FIRST_TEMPLATE, SECOND_TEMPLATE], ids=["first", "second"])
@pytest.mark.parametrize("size", SIZES)
def test_files_of_both_generations_load_resolve_and_plan(template: str, size: str, tmp_path: Path) -> None:
    values, world_size, rows = SIZES[size]
    file = tmp_path / f"{size}.toml"
    file.write_text(template.format(description=size, **values))
    cfg = load_config(["--config", str(file)], world_size=world_size)
    (stage,) = resolve_stages(cfg, resolve_layout(cfg, world_size), seed=1)
    assert (stage.name, stage.start_step, stage.end_step) == ("default", 0, values["steps"])
    assert stage.global_batch_size == rows
    assert stage.data_ranks * stage.micro_batches * stage.micro_batch_size == rows
    assert cfg.model.hf_assets_path.startswith("./assets")
    assert cfg.lr_scheduler.min_lr_factor == 0.1
    assert cfg.debug.seed == 7
    assert cfg.checkpoint.enable is True
    assert cfg.compile.enable is (size == "405B")
    text = plan_text((stage,), lambda stage: [])
    assert f"  Steps: 0 -> {values['steps']:,} ({values['steps']:,} steps)" in text
    assert f"  Dataset type: huggingface\n  Sequence length: {values['seq_len']}\n  Dataset: c4\n" in text


def test_what_the_user_wrote_is_recoverable(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[training]\nseed = 7\nseq_len = 2048\n")
    cfg = load_config(["--config", str(file), "--optimizer.lr", "8e-4"])
    assert cfg.is_set("training.seq_len")
    assert cfg.is_set("debug.seed")
    assert cfg.is_set("optimizer.lr")
    assert not cfg.is_set("training.steps")
    assert not cfg.is_set("checkpoint.enable")
    assert "steps" not in cfg.training.model_fields_set


def test_the_configuration_is_frozen() -> None:
    cfg = load_config([])
    with pytest.raises(ValueError, match="frozen"):
        cfg.training.seq_len = 1
