"""The documented quick-start configuration, as users copy it; tests of its plan and of its runs share it."""

QUICK_START = """
[training]
dataset_type = "nanoset"
dataset_folders = ["/data/general", "/data/math", "/data/code"]
dataset_weights = [0.8, 0.1, 0.1]
steps = 150000

[[training.data_stages]]
name = "general"
start_step = 0
end_step = 100000
dataset_weights = [0.8, 0.1, 0.1]

[[training.data_stages]]
name = "reasoning"
start_step = 100000
end_step = 130000
dataset_weights = [0.3, 0.35, 0.35]

[[training.data_stages]]
name = "long_context"
start_step = 130000
dataset_weights = [0.3, 0.35, 0.35]
seq_len = 32768
"""
