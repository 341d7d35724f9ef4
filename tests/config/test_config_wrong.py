"""A table of wrong configurations, each with what its one message must say: key, value, way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastage.config.load import ConfigError, load_config

NANOSET = '[training]\ndataset_type = "nanoset"\ndataset_folders = ["/a", "/b"]\nsteps = 100\n'


def stages(*tables: str, base: str = NANOSET) -> str:
    return base + "".join(f"[[training.data_stages]]\n{table}\n" for table in tables)


def stage(name: str, start: int, *more: str) -> str:
    return "\n".join([f'name = "{name}"', f"start_step = {start}", *more])


WRONG: list[tuple[str, int, list[str]]] = [
    # unknown names
    ("[training]\nsteqs = 3", 1, ["training.steqs = 3: unknown key", "did you mean training.steps?"]),
    ("[training]\nlr = 0.1", 1, ["training.lr = 0.1: unknown key", "did you mean optimizer.lr?"]),
    ("[optimiser]\nlr = 0.1", 1, ["[optimiser]: unknown table", "did you mean [optimizer]?"]),
    ("steps = 5", 1, ["steps = 5: unknown key; did you mean training.steps?"]),
    ("[quantize.linear.float9]\nemulate = true", 1, ["quantize.linear.float9", "unknown key"]),
    (stages(stage("a", 0, "seqlen = 5")), 1, ["training.data_stages[0].seqlen = 5", "data_stages[...].seq_len?"]),
    (
        "[[training.data_stages]]\nname='a'\nstart_step=0\nwarmup_steps=3",
        1,
        ["did you mean lr_scheduler.warmup_steps?"],
    ),
    # wrong kinds of value
    ('training = "fast"', 1, ['training = "fast": must be a table']),
    ('[training]\nseq_len = "2048"', 1, ['training.seq_len = "2048": must be an integer']),
    ("[training]\nseq_len = 2048.0", 1, ["training.seq_len = 2048.0: must be an integer"]),
    ("[training]\nsteps = true", 1, ["training.steps = true: must be an integer"]),
    ('[checkpoint]\nenable = "yes"', 1, ['checkpoint.enable = "yes": must be true or false']),
    ("[checkpoint]\nenable_checkpoint = 1", 1, ["checkpoint.enable_checkpoint = 1: must be true or false"]),
    ("[optimizer]\nlr = nan", 1, ["optimizer.lr = nan: must be a finite number"]),
    ("[optimizer]\nlr = -0.1", 1, ["optimizer.lr = -0.1: must be at least 0"]),
    ("[optimizer]\nbeta2 = 1.0", 1, ["optimizer.beta2 = 1.0: must be less than 1"]),
    ("[training]\nsteps = 0", 1, ["training.steps = 0: must be at least 1"]),
    ("[training]\nseq_len = -5", 1, ["training.seq_len = -5: must be at least 1"]),
    ('[training]\ndataset_type = "nanosets"', 1, ['training.dataset_type = "nanosets"', "did you mean 'nanoset'?"]),
    ('[training]\ndataset_folders = "/a"', 1, ['training.dataset_folders = "/a": must be a list in square brackets']),
    ("[training]\ndataset_folders = [1]", 1, ["training.dataset_folders[0] = 1: must be a string in quotes"]),
    ("[training]\ndata_stages = [3]", 1, ["training.data_stages[0] = 3: must be a table"]),
    ('[training.data_stages]\nname = "a"', 1, ["training.data_stages", "must be a list"]),
    ('[training]\ndataset_path = "None"', 1, ['training.dataset_path = "None": TOML has no None', "leave the key out"]),
    (stages(stage("a", 0, 'seq_len = "None"')), 1, ['training.data_stages[0].seq_len = "None": TOML has no None']),
    ("[debug]\nseed = -1", 1, ["debug.seed = -1: must be at least 0"]),
    ("[debug]\nseed = 9223372036854775808", 1, ["debug.seed = 9223372036854775808: must be at most"]),
    (
        '[lr_scheduler]\ndecay_type = "cos"',
        1,
        ["lr_scheduler.decay_type", "must be one of 'linear', 'sqrt' or 'cosine'"],
    ),
    ("[lr_scheduler]\ndecay_ratio = 1.5", 1, ["lr_scheduler.decay_ratio = 1.5: must be at most 1"]),
    ('[kernels]\nrope = "cuda"', 1, ["kernels.rope", "'auto', 'triton' or 'torch'"]),
    # two names for one key
    (
        '[model]\ntokenizer_path = "a"\nhf_assets_path = "b"',
        1,
        ["model.tokenizer_path and model.hf_assets_path: two names for one key", "keep model.hf_assets_path alone"],
    ),
    ("[lr_scheduler]\nlr_min = 0.1\nmin_lr_factor = 0.1", 1, ["lr_scheduler.lr_min and lr_scheduler.min_lr_factor"]),
    ("[training]\nseed = 1\n[debug]\nseed = 1", 1, ["training.seed and debug.seed: two names for one key"]),
    ("[training]\ncompile = true\n[compile]\nenable = true", 1, ["training.compile and compile.enable"]),
    # parts that are not built
    ("[float8]\nemulate = true", 1, ["float8.emulate = true: float8 training is not built", "default (false)"]),
    ('[mx]\nrecipe_name = "mxfp4"', 1, ['mx.recipe_name = "mxfp4"', "not built"]),
    ('[model]\nconverters = ["float8"]', 1, ['model.converters = ["float8"]', "not built", "default ([])"]),
    ("[quantize.linear.float8]\nemulate = true", 1, ["quantize.linear.float8.emulate = true", "not built"]),
    ("[fault_tolerance]\nenable = true", 1, ["fault_tolerance.enable = true", "torchrun --max-restarts"]),
    ("[training]\nenable_cpu_offload = true", 1, ["training.enable_cpu_offload = true: CPU offload is not built"]),
    ("[optimizer]\nearly_step_in_backward = true", 1, ["optimizer.early_step_in_backward = true", "not built"]),
    ('[optimizer]\nname = "Adam"', 1, ['optimizer.name = "Adam": only AdamW is built']),
    ("[parallelism]\nexpert_parallel_degree = 2", 1, ["parallelism.expert_parallel_degree = 2", "mixture-of-experts"]),
    ("[parallelism]\nenable_async_tensor_parallel = true", 1, ["asynchronous tensor parallelism is not built"]),
    ('[parallelism]\npipeline_parallel_schedule = "ZBVZeroBubble"', 1, ["is not built; use 1F1B or GPipe"]),
    ('[parallelism]\npipeline_parallel_schedule = "1f1b"', 1, ['"1f1b": is not known', "did you mean 1F1B?"]),
    (
        "[parallelism]\ncontext_parallel_degree = 2\n[training]\nseq_len = 510",
        2,
        ["context_parallel_degree = 2: seq_len = 510 of stage 'default' can't be cut", "such as 512"],
    ),
    ('[experimental]\ncustom_import = "my.module"', 1, ['experimental.custom_import = "my.module"', "not supported"]),
    (
        '[activation_checkpoint]\nmode = "memory_budget"',
        1,
        ['activation_checkpoint.mode = "memory_budget"', "not built"],
    ),
    # layout
    ("[parallelism]\ntensor_parallel_degree = 4", 6, ["6 ranks can't be divided by", "tensor 4 = 4", "multiple of 4"]),
    ("[parallelism]\ndata_parallel_shard_degree = 2", 4, ["x shard 2 = 2 ranks, but there are 4", "set it to -1"]),
    ("[parallelism]\ndata_parallel_shard_degree = 0", 1, ["data_parallel_shard_degree = 0: must be at least 1, or -1"]),
    (
        "[parallelism]\ntensor_parallel_degree = 3",
        3,
        [  # and 2048 tokens can't be cut in 3, nor 4 heads
            "tensor_parallel_degree = 3: llama3 debugmodel has 8 query heads, which it must divide",
            "and 4 key/value heads, of which it must be a divisor or a multiple; use one of [1, 2, 4, 8]",
        ],
    ),
    ("[training]\nseq_len = 1023\n[parallelism]\ntensor_parallel_degree = 2", 2, ["seq_len = 1023", "such as 1024"]),
    ("[parallelism]\npipeline_parallel_degree = 9", 9, ["pipeline_parallel_degree = 9: 6 layers can't be spread"]),
    (
        '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_split_points = ["layers.9"]',
        2,
        ["layers.1 to layers.5"],
    ),
    (
        '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_split_points = ["layers.1", "layers.3"]',
        2,
        ["2 points make 3 parts"],
    ),
    (
        "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_layers_per_stage = 2",
        2,
        ["6 layers make 3 parts"],
    ),
    # batch
    ("[training]\nglobal_batch_size = 0", 1, ["training.global_batch_size = 0: must be at least 1, or -1"]),
    (
        "[training]\nglobal_batch_size = 12",
        1,
        [
            "training.global_batch_size = 12: does not divide into 1 data ranks x training.local_batch_size = 8",
            "set local_batch_size = 6 in training",
        ],
    ),
    (
        "[training]\nglobal_batch_size = 10",
        4,
        ["4 data ranks x training.local_batch_size = 8", "multiple of 32, such as 32"],
    ),
    (
        stages(stage("a", 0), stage("b", 50, "global_batch_size = 4")),
        1,
        [
            "training.data_stages[1].global_batch_size = 4: does not divide into 1 data ranks x "
            "training.local_batch_size = 8 (stage 'b'); set local_batch_size = 4 in training.data_stages[1]"
        ],
    ),
    (
        "[training]\nglobal_batch_size = 9\n[parallelism]\npipeline_parallel_degree = 2\n"
        "pipeline_parallel_microbatch_size = 2",
        2,
        [
            "parallelism.pipeline_parallel_microbatch_size = 2",
            "set pipeline_parallel_microbatch_size = 1 in parallelism",
        ],
    ),
    (
        "[training]\nglobal_batch_size = 1\n[parallelism]\npipeline_parallel_degree = 2",
        2,
        ["needs at least 2", "raise global_batch_size to 2"],
    ),
    # model
    ('[model]\nflavor = "9B"', 1, ['model.flavor = "9B"', "use one of debugmodel"]),
    ('[model]\nname = "gpt"', 1, ['model.name = "gpt"', "llama3"]),
    ("[model]\nn_heads = 7", 1, ["model.n_heads = 7: does not divide model.dim = 256; set model.head_dim"]),
    ("[model]\nn_kv_heads = 3", 1, ["model.n_kv_heads = 3: does not divide model.n_heads = 8"]),
    ("[model]\nhead_dim = 31", 1, ["model.head_dim = 31: must be even"]),
    ('[model.rope_scaling]\nkind = "linear"', 1, ["model.rope_scaling.factor: missing"]),
    ("[model.rope_scaling]\nfactor = 2.0", 1, ["model.rope_scaling.kind: missing"]),
    (
        '[training.rope_scaling]\nkind = "linear"\nfactor = 2\nbeta_fast = 3',
        1,
        ['training.rope_scaling.beta_fast: kind "linear" does not use it'],
    ),
    # stages: place
    ("[[training.data_stages]]\nstart_step = 0", 1, ["training.data_stages[0].name: missing"]),
    ('[[training.data_stages]]\nname = "a"', 1, ["training.data_stages[0].start_step: missing"]),
    (stages(stage("", 0)), 1, ['training.data_stages[0].name = "": is empty']),
    (
        stages(stage("a", 0), stage("a", 50)),
        1,
        ['training.data_stages[1].name = "a": already the name of training.data_stages[0]'],
    ),
    (
        stages(stage("default", 10)),
        1,
        ['training.data_stages[0].name = "default": already the name of the stage that fills'],
    ),
    (stages(stage("a", -5)), 1, ["training.data_stages[0].start_step = -5: must be at least 0"]),
    (
        stages(stage("a", 0, "end_step = 0"), stage("b", 50)),
        1,
        ["training.data_stages[0].end_step = 0: must be greater than start_step = 0"],
    ),
    (
        stages(stage("a", 0, "end_step = 40"), stage("b", 50)),
        1,
        ["end_step = 40: a gap before stage 'b'", "data_stages[1].start_step = 50; make them equal"],
    ),
    (
        stages(stage("b", 50), stage("a", 0, "end_step = 60")),
        1,
        ["training.data_stages[1].end_step = 60: an overlap", "training.data_stages[0].start_step = 50"],
    ),
    (stages(stage("a", 0), stage("b", 0)), 1, ["stages 'a' and 'b' start together"]),
    (
        stages(stage("a", 0, "end_step = 90")),
        1,
        ["end_step = 90: the last stage ends before training.steps = 100", "leave end_step out"],
    ),
    # stages: data
    (
        stages(stage("a", 0, "dataset_weights = [0.5, nan]")),
        1,
        ["training.data_stages[0].dataset_weights = [0.5, nan]: nan is not a finite number"],
    ),
    (stages(stage("a", 0, "dataset_weights = [0.5, inf]")), 1, ["inf is not a finite number"]),
    (stages(stage("a", 0, "dataset_weights = [0.5, -0.5]")), 1, ["-0.5 is negative; 0 means never drawn"]),
    (stages(stage("a", 0, "dataset_weights = [0.0, 0.0]")), 1, ["all weights are zero"]),
    (
        stages(stage("a", 0, "dataset_weights = [1.0]")),
        1,
        ["[1.0]: 1 weights for 2 dataset_folders of training.data_stages[0]; give 2"],
    ),
    (
        stages(stage("a", 0, 'dataset_folders = ["/a"]'), base=NANOSET + "dataset_weights = [0.5, 0.5]\n"),
        1,
        [
            "training.dataset_weights = [0.5, 0.5]: 2 weights for 1 dataset_folders of training.data_stages[0]",
            "set dataset_weights in training.data_stages[0]",
        ],
    ),
    (
        NANOSET + "dataset_weights = [1, 2, 3]",
        1,
        ["training.dataset_weights = [1.0, 2.0, 3.0]: 3 weights for 2 dataset_folders of training; give 2"],
    ),
    (
        stages(stage("a", 0, 'dataset_path = "/x"', "dataset_weights = [1, 2]")),
        1,
        ["2 weights for one source of training.data_stages[0]; give 1"],
    ),
    (stages(stage("a", 0, "seq_len = 0")), 1, ["training.data_stages[0].seq_len = 0 (stage 'a'): must be at least 1"]),
    (
        stages(stage("a", 0, "dataset_random_seed = -3")),
        1,
        ["training.data_stages[0].dataset_random_seed = -3 (stage 'a'): must be at least 0"],
    ),
    (
        stages(stage("a", 0, 'dataset_type = "parquet"')),
        1,
        ["training.data_stages[0].dataset_type", "'packed_memmap' or 'megatron'"],
    ),
    (
        stages(stage("a", 0, 'dataset = "c4"')),
        1,
        ['training.data_stages[0].dataset = "c4": dataset_type "nanoset" takes no dataset name'],
    ),
    (
        stages(stage("a", 0, 'dataset_path = "/x"', 'dataset_folders = ["/y"]')),
        1,
        ["dataset_path and training.data_stages[0].dataset_folders: both set"],
    ),
    (
        stages(stage("a", 0, 'dataset_type = "huggingface"', 'dataset = "c4"', 'dataset_folders = ["/y"]')),
        1,
        ["training.data_stages[0].dataset and training.data_stages[0].dataset_folders: both set; keep one of them"],
    ),
    (
        stages(stage("a", 0, 'dataset_path = ""')),
        1,
        ['training.data_stages[0].dataset_path = "": is empty; leave it out'],
    ),
    (
        stages(stage("a", 0, 'dataset_folders = ["/x", "/x"]')),
        1,
        ['dataset_folders: "/x" is listed twice; list it once'],
    ),
    (
        stages(stage("a", 0, 'dataset_folders = ["/x", " "]')),
        1,
        ["training.data_stages[0].dataset_folders: entry 1 is empty"],
    ),
    (
        '[training]\ndataset_type = "packed_memmap"',
        1,
        ['training: dataset_type "packed_memmap" needs data; set dataset_folders'],
    ),
    # stages: the rest
    (
        stages(stage("a", 0), stage("b", 50, 'lr_decay_type = "cosine"')),
        1,
        ["training.data_stages[1].lr_decay_type", "needs lr_end"],
    ),
    (
        stages(stage("a", 0), stage("b", 50, "lr_warmup_steps = 5")),
        1,
        ["training.data_stages[1].lr_warmup_steps = 5: needs lr"],
    ),
    (
        stages(stage("a", 0), stage("b", 50, "lr = 1e-4", "lr_warmup_steps = 60")),
        1,
        ["the stage has only 50 steps (stage 'b')"],
    ),
    (
        stages(stage("a", 0, 'recompute_mode = "full"', 'recompute_option = "2"')),
        1,
        ['recomputation mode "full" takes no option'],
    ),
    (
        stages(stage("a", 0, 'recompute_option = "0"')),
        1,
        ['training.data_stages[0].recompute_option = "0": must be "op", or n'],
    ),
    (
        stages(stage("a", 0, "context_parallel_degree = 4")),
        2,
        ["training.data_stages[0].context_parallel_degree = 4: does not divide the 2 ranks"],
    ),
    (
        stages(stage("a", 0, "[training.data_stages.rope_scaling]", 'kind = "none"', "factor = 2")),
        1,
        ['rope_scaling.factor: kind "none" does not use it'],
    ),
    # between keys
    (
        "[training]\nsteps = 100\n[lr_scheduler]\ntotal_steps = 50",
        1,
        ["lr_scheduler.total_steps = 50", "training.steps = 100"],
    ),
    ('[checkpoint]\nexclude_from_loading = ["optim"]', 1, ['"optim" is not a part of a checkpoint; use optimizer']),
    ('[compile]\ncomponents = ["optimizer"]', 1, ['compile.components: "optimizer"', "use model, loss"]),
    (
        "[training.dataloader]\nprefetch_factor = 2",
        1,
        ["training.dataloader.prefetch_factor = 2: needs workers; set num_workers"],
    ),
    (
        '[activation_checkpoint]\ndeterminism_check = "full"',
        1,
        ['determinism_check = "full": must be "default" or "none"'],
    ),
    ('[validation]\ndataset_path = "/a"\ndataset_folders = ["/b"]', 1, ["validation.dataset_folders: both set"]),
    (
        "[parallelism]\npipeline_parallel_degree = 2\nmodule_fqns_per_model_part = [['norm']]\n"
        'pipeline_parallel_split_points = ["layers.3"]',
        2,
        ["parallelism.module_fqns_per_model_part: both set; keep one of them"],
    ),
    (
        stages(stage("a", 0, 'recompute_mode = "memory_budget"')),
        1,
        ['training.data_stages[0].recompute_mode = "memory_budget"', "not built"],
    ),
    (stages(stage("a\\u0007", 0)), 1, ["holds characters that can't be printed on one line"]),
    (
        stages(stage("a", 0, "context_parallel_degree = 3")),
        4,
        ["context_parallel_degree = 3: does not divide the 4 ranks"],
    ),
    ('[training]\ndataset_path = ""', 1, ['training.dataset_path = "": is empty; leave it out']),
    ("compile = 3\n[training]\ncompile = true", 1, ["compile = 3: must be a table"]),
    ("[training]\nsteps = 4294967296", 1, ["training.steps = 4294967296: must be at most 2147483647"]),
    ("[[training]]\nsteps = 3", 1, ["must be a table (written as [training], in single brackets)"]),
    ('[training.data_stages]\nname = "a"', 1, ["write each under [[training.data_stages]], in double brackets"]),
    ('[job]\ndump_folder = ""', 1, ['job.dump_folder = "": is empty; leave it out']),
    ('[model]\ntokenizer_path = ""', 1, ['model.hf_assets_path = "": is empty; leave it out']),
    (
        stages(stage("a", 0, "dataset_weights = [1, 2]"), base=NANOSET + "dataset_weights = [1, -2]\n"),
        1,
        ["training.dataset_weights = [1.0, -2.0]: -2.0 is negative"],
    ),
    (
        stages(stage("a", 0, "dataset_weights = [1, 2]"), base=NANOSET + "dataset_weights = [1, 2, 3]\n"),
        1,
        ["3 weights for 2 training.dataset_folders", "every stage has its own"],
    ),
    ("[validation]\nsteps = 0", 1, ["validation.steps = 0: nothing would be validated"]),
]


@pytest.mark.parametrize(("text", "world_size", "parts"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_wrong_configuration(text: str, world_size: int, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(file)], world_size)
    problems = caught.value.problems
    assert any(all(part in problem for part in parts) for problem in problems), "\n".join(problems)
    assert len(problems) == len(set(problems)) <= 4


def test_the_table_is_long_enough() -> None:
    assert len(WRONG) >= 40
