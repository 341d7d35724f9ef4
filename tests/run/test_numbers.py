"""Six updates of a run against the same six written by hand: transformers' Llama, torch's AdamW, the raw token file."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training import TINY, VOCAB, train, write_nanoset

from megastage.config.layout import resolve_layout
from megastage.config.load import load_config
from megastage.data.engine import DataEngine
from megastage.stages import resolve_stages

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.dist

SEQ_LEN, ROWS, STEPS = 96, 6, 6
HF_NAMES = (
    ("model.tok_embeddings", "model.embed_tokens"), ("model.output", "lm_head"), ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"), ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"), ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"), ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"), ("feed_forward.w2", "mlp.down_proj"),
)  # fmt: skip


def _weights(folder: Path) -> dict[str, Tensor]:
    """The model of a one-rank checkpoint under transformers' names."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for key, value in load_file(file).items():
            if key.startswith("model."):
                for ours, theirs in HF_NAMES:
                    key = key.replace(ours, theirs)
                found[key] = value
    return found


def _lr(step: int) -> float:
    """Two steps up to 3e-3, and over the second half of the run a cosine down to a tenth."""
    if step < 2:
        return 3e-3 * (step + 1) / 2
    progress = max(0, step - STEPS // 2) / (STEPS // 2)
    return 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def _loss(model: nn.Module, raw: np.ndarray, starts: list[int]) -> tuple[Tensor, int]:
    """Mean over all next-token losses of the rows at `starts`, every document run alone (token 0 ends one)."""
    total, count = torch.zeros(()), 0
    for start in starts:
        row, following = raw[start : start + SEQ_LEN], raw[start + 1 : start + SEQ_LEN + 1]
        cuts = [0, *(np.flatnonzero(row == 0) + 1).tolist(), SEQ_LEN]
        for low, high in pairwise(cuts):
            targets = torch.tensor(following[low:high][row[low:high] != 0])
            if len(targets):
                logits = model(torch.tensor(row[low:high])[None]).logits[0, : len(targets)]
                total = total + nn.functional.cross_entropy(logits, targets, reduction="sum")
                count += len(targets)
    return total / count, count


def _starts(argv: list[str], raw: np.ndarray) -> list[list[int]]:
    """Where in the token file the rows of each batch lie, found by their content."""
    cfg = load_config(argv, 1)
    engine = DataEngine.build(resolve_stages(cfg, resolve_layout(cfg, 1), seed=7), vocab_size=VOCAB)
    engine.enter(0, data_rank=0, data_ranks=1)
    windows = np.lib.stride_tricks.sliding_window_view(raw[:-1], SEQ_LEN)
    batches = [engine.next().tokens_BT.numpy() for _ in range(STEPS)]
    return [[int(np.flatnonzero((windows == row).all(1))[0]) for row in batch] for batch in batches]


def test_a_run_equals_a_loop_written_by_hand(tmp_path):
    data = write_nanoset(tmp_path / "data", 40_000, 3)
    argv = [
        *TINY, "--training.dataset_type", "nanoset", "--training.dataset_path", str(data),
        "--training.steps", str(STEPS), "--training.seq_len", str(SEQ_LEN), "--training.global_batch_size", str(ROWS),
        "--training.local_batch_size", "2", "--training.max_norm", "0.5", "--model.rope_theta", "20000.0",
        "--lr_scheduler.decay_ratio", "0.5", "--lr_scheduler.decay_type", "cosine",
        "--lr_scheduler.min_lr_factor", "0.1", "--checkpoint.enable", "true",
    ]  # fmt: skip
    run = train(1, [*argv, "--job.dump_folder", str(tmp_path / "run")])
    # without a learning rate an update changes nothing: the first checkpoint holds the initial weights
    train(
        1, [*argv, "--optimizer.lr", "0.0", "--checkpoint.interval", "1", "--job.dump_folder", str(tmp_path / "still")]
    )
    shape = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=SEQ_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0}, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape)
    model.load_state_dict(_weights(tmp_path / "still" / "checkpoint" / "step-1"))
    raw = np.fromfile(data / "00000.ds", "<u2").astype(np.int64)
    batches = _starts(argv, raw)
    assert len({start for batch in batches for start in batch}) == STEPS * ROWS
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step, (starts, record) in enumerate(zip(batches, run, strict=True)):
        loss, count = _loss(model, raw, starts)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.param_groups[0]["lr"] = _lr(step)
        adamw.step()
        adamw.zero_grad()
        assert record["valid_labels"] == count
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["lr"] == pytest.approx(_lr(step), rel=1e-12)
        assert record["tokens"] == (step + 1) * ROWS * SEQ_LEN
    final = _weights(tmp_path / "run" / "checkpoint" / f"step-{STEPS}")
    mean = np.mean([(value - final[key]).abs().mean().item() for key, value in model.state_dict().items()])
    assert mean < 1e-6
