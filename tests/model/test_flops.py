"""FLOPs against PyTorch's own counter, brute-force pair counts and published figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megastage.flops import (
    attended_pairs,
    causal_pairs,
    forward_flops,
    model_flops,
    peak_flops,
    train_flops,
    utilisation,
)
from megastage.model.config import ModelConfig
from megastage.model.decoder import Decoder
from megastage.model.flavors import get_flavor
from megastage.model.ops import Ops
from megastage.recompute import apply as set_recompute

B, T = 2, 24


def square_attention(q, k, v, cu):
    """All T * T pairs as two matrix products, which the counter counts exactly."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def counted(cfg: ModelConfig, mode: str = "none", option: str = "2", early_stop: bool = False) -> tuple[int, int]:
    """(forward, forward + backward) by torch.utils.flop_counter."""
    model = Decoder(cfg, replace(Ops(), attention=square_attention))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.set_rope(cfg.rope, T)
    set_recompute(model, mode, option, preserve_rng_state=False, early_stop=early_stop)
    with FlopCounterMode(display=False) as counter:
        out = model.logits(model(torch.zeros(B, T, dtype=torch.long), torch.arange(T).expand(B, T))).sum()
        forward = counter.get_total_flops()
        out.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_the_counter(tied: bool) -> None:
    cfg = ModelConfig("t", 32, 3, 4, 2, 16, 56, 77, qk_norm=True, tied_embeddings=tied)
    pairs = B * T * T
    forward, step = counted(cfg)
    assert forward == forward_flops(cfg, B * T, pairs)
    assert step == model_flops(cfg, B * T, pairs)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize(("mode", "option", "layers"), [("full", "2", 5), ("selective", "2", 3), ("selective", "3", 2)])
def test_recomputation_repeats_whole_layers(mode: str, option: str, layers: int, early_stop: bool) -> None:
    cfg = ModelConfig("t", 32, 5, 4, 2, 16, 56, 77)
    pairs = B * T * T
    head = 2 * B * T * 77 * 32
    a_layer = (forward_flops(cfg, B * T, pairs) - head) // 5
    spared = 2 * B * T * 56 * 32 if early_stop else 0  # backward needs no output of w2
    expected = model_flops(cfg, B * T, pairs) + layers * (a_layer - spared)
    assert counted(cfg, mode, option, early_stop)[1] == expected


def test_packed_batch() -> None:
    cfg = ModelConfig("t", 32, 5, 4, 2, 16, 56, 77)
    cu = torch.tensor([[0, 4, 10, 10], [0, 12, 12, 12]], dtype=torch.int32)
    assert train_flops(cfg, cu) == model_flops(cfg, 10 + 12, 10 + 21 + 78)


def test_pairs_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    rows, expected = [], 0
    for _ in range(5):
        ends = np.unique(generator.integers(1, 60, 7))
        document = np.searchsorted(ends, np.arange(ends[-1]), side="right")
        same = document[:, None] == document[None, :]
        expected += int(np.tril(same).sum())
        rows.append(np.pad(np.concatenate(([0], ends)), (0, 8 - len(ends)), mode="edge"))
    assert attended_pairs(np.stack(rows).astype(np.int32)) == expected
    assert attended_pairs(torch.tensor(np.stack(rows), dtype=torch.int32)) == expected
    assert attended_pairs([0, 40]) == causal_pairs(40) == 820


def test_long_rows_do_not_overflow() -> None:
    assert attended_pairs(np.array([[0, 1 << 20]] * 4, np.int32)) == 4 * ((1 << 20) * ((1 << 20) + 1) // 2)


@pytest.mark.parametrize(("seq_len", "share"), [(4096, 0.07), (32_768, 0.36)])
def test_attention_share_of_llama_8b(seq_len: int, share: float) -> None:
    """The shares of forward FLOPs that attention takes at 4k and at 32k, as known for Llama-3 8B."""
    cfg = get_flavor("llama3", "8B")
    whole = forward_flops(cfg, seq_len, causal_pairs(seq_len))
    assert 1 - forward_flops(cfg, seq_len, 0) / whole == pytest.approx(share, abs=0.01)


def test_near_six_per_parameter() -> None:
    """Without attention a step costs 6 FLOPs per token and parameter; the embedding table is not multiplied."""
    cfg = get_flavor("llama3", "405B")
    parameters = 405_853_388_800 - cfg.vocab_size * cfg.dim - (2 * cfg.n_layers + 1) * cfg.dim
    assert model_flops(cfg, 1, 0) == 6 * parameters


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD EPYC 9354", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_peak_of_a_cpu_device_is_unknown() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_utilisation() -> None:
    assert utilisation(8e12, 2.0, 4, 10e12) == pytest.approx(0.1)
    assert utilisation(1.0, 1.0, 1, None) is None
