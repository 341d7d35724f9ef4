"""Keys and defaults of the two generations of TOML files that must load, as documented for them."""

FIRST = r"""
[job] config_file = None; dump_folder = './outputs'; description = 'default job';
  use_for_integration_test = False; print_args = False
[profiling] enable_profiling = False; save_traces_folder = 'profile_traces'; profile_freq = 10;
  enable_memory_snapshot = False; save_memory_snapshot_folder = 'memory_snapshot'
[metrics] log_freq = 10; enable_tensorboard = False; disable_color_printing = False; save_tb_folder = 'tb';
  save_for_all_ranks = False; enable_wandb = False
[model] name = 'llama3'; flavor = 'debugmodel'; tokenizer_path = (a path); converters = [];
  print_after_conversion = False
[optimizer] name = 'AdamW'; lr = 0.0008; beta1 = 0.9; beta2 = 0.95; eps = 1e-08; weight_decay = 0.1;
  implementation = 'fused'; early_step_in_backward = False
[lr_scheduler] warmup_steps = 200; decay_ratio = None; decay_type = 'linear'; lr_min = 0.0
[training] dataset = 'c4_test'; dataset_path = None; local_batch_size = 8; global_batch_size = -1;
  seq_len = 2048; max_norm = 1.0; steps = 10000; enable_cpu_offload = False;
  mixed_precision_param = 'bfloat16'; mixed_precision_reduce = 'float32'; compile = False; gc_freq = 50;
  gc_debug = False; seed = None; deterministic = False
[parallelism] data_parallel_replicate_degree = 1; enable_compiled_autograd = False;
  data_parallel_shard_degree = -1; fsdp_reshard_after_forward = 'default'; tensor_parallel_degree = 1;
  disable_loss_parallel = False; enable_async_tensor_parallel = False; pipeline_parallel_degree = 1;
  pipeline_parallel_split_points = []; pipeline_parallel_layers_per_stage = None;
  pipeline_parallel_schedule = '1F1B'; pipeline_parallel_schedule_csv = '';
  pipeline_parallel_microbatch_size = 1; context_parallel_degree = 1;
  context_parallel_rotate_method = 'allgather'
[checkpoint] enable_checkpoint = False; folder = 'checkpoint'; initial_load_path = None;
  initial_load_model_weights_only = True; interval = 500; last_save_model_weights_only = False;
  export_dtype = 'float32'; create_seed_checkpoint = False; async_mode = 'disabled'; keep_latest_k = 10;
  load_step = -1; exclude_from_loading = []; enable_first_step_checkpoint = False
[activation_checkpoint] mode = 'selective'; selective_ac_option = '2'
[float8] enable_fsdp_float8_all_gather = False; precompute_float8_dynamic_scale_for_fsdp = False;
  force_recompute_fp8_weight_in_bwd = False; recipe_name = None; filter_fqns = []; emulate = False
[mx] use_fp8_dim1_cast_triton_kernel = True; recipe_name = 'mxfp8'; filter_fqns = ['output']
[comm] init_timeout_seconds = 300; train_timeout_seconds = 100; trace_buf_size = 20000
[memory_estimation] enabled = False; disable_fake_mode = False
[fault_tolerance] enable = False; replica_id = 0; group_size = 0; min_replica_size = 1;
  semi_sync_method = None; sync_steps = 5; should_quantize = False; fragment_sync_delay = 0;
  fragment_update_alpha = 0.0
[experimental] custom_import = ''; custom_args_module = ''
"""

SECOND = r"""
[job] config_file = None; dump_folder = './outputs'; description = 'default job'; print_config = False;
  save_config_file = None; custom_config_module = ''
[profiling] enable_profiling = False; save_traces_folder = 'profile_traces'; profile_freq = 10;
  profiler_active = 1; profiler_warmup = 3; enable_memory_snapshot = False;
  save_memory_snapshot_folder = 'memory_snapshot'
[metrics] log_freq = 10; enable_tensorboard = False; disable_color_printing = False; save_tb_folder = 'tb';
  save_for_all_ranks = False; enable_wandb = False
[model] name = 'llama3'; flavor = 'debugmodel'; hf_assets_path = (a path); tokenizer_path = None;
  converters = []; print_after_conversion = False
[optimizer] name = 'AdamW'; lr = 0.0008; beta1 = 0.9; beta2 = 0.95; eps = 1e-08; weight_decay = 0.1;
  implementation = 'fused'; early_step_in_backward = False
[lr_scheduler] warmup_steps = 200; total_steps = None; decay_ratio = None; decay_type = 'linear';
  min_lr_factor = 0.0
[training] dataset = 'c4_test'; dataset_path = None; local_batch_size = 8; global_batch_size = -1;
  seq_len = 2048; max_norm = 1.0; steps = 10000; enable_cpu_offload = False; dtype = 'float32';
  mixed_precision_param = 'bfloat16'; mixed_precision_reduce = 'float32'; gc_freq = 50; gc_debug = False;
  dataloader = (table)
[parallelism] data_parallel_replicate_degree = 1; data_parallel_shard_degree = -1;
  fsdp_reshard_after_forward = 'default'; tensor_parallel_degree = 1; disable_loss_parallel = False;
  enable_async_tensor_parallel = False; pipeline_parallel_degree = 1; module_fqns_per_model_part = None;
  pipeline_parallel_first_stage_less_layers = 1; pipeline_parallel_last_stage_less_layers = 1;
  pipeline_parallel_layers_per_stage = None; pipeline_parallel_schedule = '1F1B';
  pipeline_parallel_schedule_csv = ''; pipeline_parallel_microbatch_size = 1;
  pipeline_parallel_expert_parallel_overlap = True; context_parallel_degree = 1;
  context_parallel_load_balancer = 'headtail'; context_parallel_rotate_method = 'allgather';
  expert_parallel_degree = 1; expert_tensor_parallel_degree = 1; expert_parallel_comm_backend = 'standard'
[checkpoint] enable = False; enable_ft_dataloader_checkpoints = True; folder = 'checkpoint'; interval = 500;
  initial_load_path = None; initial_load_model_only = True; initial_load_in_hf = False;
  initial_load_in_hf_quantized = False; last_save_model_only = True; last_save_in_hf = False;
  export_dtype = 'float32'; async_mode = 'disabled'; keep_latest_k = 10; load_step = -1;
  exclude_from_loading = []; enable_first_step_checkpoint = False; create_seed_checkpoint = False;
  load_only = False
[activation_checkpoint] mode = 'selective'; selective_ac_option = '2';
  per_op_sac_force_recompute_mm_shapes_by_fqns = ['moe.router.gate']; early_stop = False; memory_budget = 0.5;
  visualize_memory_budget_pareto = False; preserve_rng_state = True; determinism_check = 'default';
  debug = False
[compile] enable = False; components = ['model', 'loss']; backend = 'inductor'
[quantize] linear = (table); grouped_mm = (table)
[comm] init_timeout_seconds = 300; train_timeout_seconds = 100; trace_buf_size = 20000;
  save_traces_folder = 'comm_traces'; save_traces_file_prefix = 'rank_'; mode = 'default'
[memory_estimation] enable = False; disable_fake_mode = False
[fault_tolerance] enable = False; process_group = 'gloo'; process_group_timeout_ms = 10000; replica_id = 0;
  group_size = 0; min_replica_size = 1; semi_sync_method = None
[experimental] custom_import = ''; custom_args_module = ''
[validation] enable = False; dataset = 'c4_validation'; dataset_path = None; local_batch_size = 8;
  seq_len = 2048; freq = 10; steps = -1; dataloader = (table)
[debug] seed = None; deterministic = False; deterministic_warn_only = False; moe_force_load_balance = False
"""
