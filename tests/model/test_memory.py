"""The memory model against hand-computed bytes and against what a real forward pass keeps alive."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megastage.memory import GIB, Bytes, estimate, in_flight, report, saved_bytes, split_layers
from megastage.model.config import ModelConfig
from megastage.model.decoder import Decoder
from megastage.model.flavors import get_flavor
from megastage.model.ops import Ops
from megastage.model.parameters import count_parameters
from megastage.recompute import apply as set_recompute

LLAMA_8B = get_flavor("llama3", "8B")


def layout(pp: int = 1, dp_shard: int = 1, cp: int = 1, tp: int = 1) -> SimpleNamespace:
    return SimpleNamespace(pp=pp, dp_shard=dp_shard, cp=cp, tp=tp)


def test_one_device_by_hand() -> None:
    cfg = ModelConfig("t", 8, 2, 2, 1, 4, 12, 10)
    layer = 2 * 8 + 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 12  # norms, wq, wk + wv, wo, feed-forward
    root = 2 * 10 * 8 + 8
    assert count_parameters(cfg) == 2 * layer + root == 1160
    (got,) = estimate(cfg, layout(), seq_len=16, rows=3, loss_chunk_tokens=5)
    assert got.parameters == got.gradients == 4 * 1160
    assert got.optimizer == 8 * 1160
    assert got.gathered_parameters == 2 * 1160  # two layers are all there are
    assert got.gathered_gradients == 496 * (2 + 4)
    # per token and layer 12h + 4h_kv + 6f + 4a = 96 + 16 + 72 + 8; the final norm's input and output 2 * 2h
    assert got.activations == 48 * (2 * 192 + 32)
    layer_backward = 48 * 2 * (3 * 12 + 2 * 8)
    loss = 5 * 10 * 10 + 10 * 8 * 6 + 2 * 48 * 8 * 2
    assert got.workspace == max(layer_backward, loss)
    assert got.total == sum((4640, 4640, 9280, 2320, 2976, 19968, got.workspace))


def test_ranks_that_share_a_key_value_head_hold_all_of_them() -> None:
    cfg = ModelConfig("t", 8, 2, 4, 2, 4, 12, 12)
    divided = 8 * 16 + 16 * 8 + 3 * 8 * 12  # wq, wo, feed-forward
    two, four = (estimate(cfg, layout(tp=tp), seq_len=16, rows=1)[0] for tp in (2, 4))
    assert two.parameters == 4 * (2 * (2 * 8 + divided // 2 + 2 * 8 * 8 // 2) + 2 * 12 * 8 // 2 + 8)
    assert four.parameters == 4 * (2 * (2 * 8 + divided // 4 + 2 * 8 * 8) + 2 * 12 * 8 // 4 + 8)
    # per token and layer, of which one of the two heads stays a rank's own: (8h + 4 of queries + 6f + 4a) / tp is left
    assert saved_bytes(cfg, 4) == saved_bytes(cfg, 2) - (8 * 8 + 4 * 16 + 6 * 12 + 4 * 4) // 4


def test_llama_8b_at_32k_as_published_formula() -> None:
    """136 GiB of activations without recomputation, 17 on each of 8 tensor-parallel ranks, 8 GiB of layer inputs."""
    (alone,) = estimate(LLAMA_8B, layout(), seq_len=32_768, rows=1)
    (split,) = estimate(LLAMA_8B, layout(tp=8), seq_len=32_768, rows=1, keep_gathered=False)
    (full,) = estimate(LLAMA_8B, layout(), seq_len=32_768, rows=1, recompute=("full", ""))
    assert alone.activations / GIB == pytest.approx(136.6, abs=0.1)
    assert split.activations / GIB == pytest.approx(17.1, abs=0.1)
    assert full.activations / GIB == pytest.approx(8.5, abs=0.01)  # 32 * 32768 * 8 KiB, and the final norm


def test_adam_takes_sixteen_bytes_a_parameter_over_the_shards() -> None:
    (got,) = estimate(LLAMA_8B, layout(dp_shard=32, cp=2), seq_len=8192, rows=1)
    states = got.parameters + got.gradients + got.optimizer
    assert states == pytest.approx(16 * 8_030_261_248 / 64, rel=1e-6)


def test_tied_table_counts_once_and_on_both_ends_of_a_pipeline() -> None:
    cfg = get_flavor("qwen3", "0.6B")
    (one,) = estimate(cfg, layout(), seq_len=128, rows=1)
    two = estimate(cfg, layout(pp=2), seq_len=128, rows=1)
    assert one.parameters == 4 * count_parameters(cfg)
    assert sum(rank.parameters for rank in two) == 4 * (count_parameters(cfg) + cfg.vocab_size * cfg.dim)


def test_first_rank_of_1f1b_gets_no_relief() -> None:
    ranks = estimate(LLAMA_8B, layout(pp=4), seq_len=4096, rows=1, micro_batches=16)
    (alone,) = estimate(LLAMA_8B, layout(), seq_len=4096, rows=1)
    head = 4096 * 2 * 4096 * 2
    assert ranks[0].activations == alone.activations - head
    assert [rank.activations for rank in ranks] == sorted((rank.activations for rank in ranks), reverse=True)


def test_context_parallelism_divides_all_but_keys_and_values() -> None:
    whole, part = (estimate(LLAMA_8B, layout(cp=cp), seq_len=32_768, rows=1)[0].activations for cp in (1, 4))
    kv = 32 * 32_768 * 4 * 1024
    joined_output = 32 * 8192 * 2 * 4096
    assert part - kv - joined_output == (whole - kv) / 4


def test_selective_recomputation_lies_between() -> None:
    got = [
        estimate(LLAMA_8B, layout(), seq_len=8192, rows=1, recompute=policy)[0].activations
        for policy in [("full", ""), ("selective", "op"), ("selective", "2"), ("none", "")]
    ]
    assert got == sorted(got)
    assert got[2] - got[0] == pytest.approx((got[3] - got[0]) / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "rank", "micro_batches", "chunks", "expected"),
    [
        ("GPipe", 0, 12, 1, 12),
        ("1F1B", 0, 12, 1, 4),
        ("1F1B", 3, 12, 1, 1),
        ("1F1B", 0, 2, 1, 2),
        ("Interleaved1F1B", 0, 12, 2, 5.5),  # p (1 + (p - 1) / (p v)), Korthikanti et al.
        ("Interleaved1F1B", 3, 12, 2, 2.5),
        ("ZBVZeroBubble", 2, 12, 2, 4),
    ],
)
def test_micro_batches_in_flight(schedule: str, rank: int, micro_batches: int, chunks: int, expected: float) -> None:
    assert in_flight(schedule, 4, rank, micro_batches, chunks) == expected


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match='pipeline_parallel_schedule = "2F2B"'):
        in_flight("2F2B", 4, 0, 8)


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        (("some", "2"), 'activation_checkpoint.mode = "some"'),
        (("selective", "0"), 'selective_ac_option = "0"'),
        (("selective", "ops"), 'selective_ac_option = "ops"'),
    ],
)
def test_unknown_recomputation(recompute: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(LLAMA_8B, layout(), seq_len=64, rows=1, recompute=recompute)


def test_split_and_report() -> None:
    assert split_layers(10, 4) == [range(3), range(3, 6), range(6, 8), range(8, 10)]
    lines = report(estimate(LLAMA_8B, layout(pp=2, tp=8), seq_len=8192, rows=1))
    assert len(lines) == 2
    assert lines[1].startswith("pipeline rank 1: ")
    assert "gathered gradients" in lines[0]


class _Alive(TorchDispatchMode):
    """Bytes of all storages made under the mode that still exist; those of `known` tensors do not count."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


class _Fused(torch.autograd.Function):
    """Saves what a fused kernel saves: its inputs, nothing in between. Backward is not needed here."""

    @staticmethod
    def forward(ctx, op, save, *inputs):
        out = op(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        ctx.save_for_backward(*save(inputs, outputs))
        return out


def _attend(q, k, v):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, True
    )
    return out.transpose(1, 2), lse


PLAIN = Ops()
FUSED = Ops(
    attention=lambda q, k, v, cu: _Fused.apply(_attend, lambda i, o: (*i, *o), q, k, v)[0],
    rms_norm=lambda x, w, eps: _Fused.apply(lambda x, w: PLAIN.rms_norm(x, w, eps), lambda i, o: i, x, w),
    add_rms_norm=lambda x, r, w, eps: _Fused.apply(
        lambda x, r, w: PLAIN.add_rms_norm(x, r, w, eps), lambda i, o: (o[1], w), x, r, w
    ),
    rope_qk=lambda q, k, cos, sin, p: _Fused.apply(PLAIN.rope_qk, lambda i, o: i[2:], q, k, cos, sin, p),
    swiglu=lambda gate, up: _Fused.apply(PLAIN.swiglu, lambda i, o: i, gate, up),
)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("mode", "option"), [("none", "2"), ("full", "2"), ("selective", "2"), ("selective", "op")])
def test_equals_what_a_forward_pass_keeps(qk_norm: bool, dtype: torch.dtype, mode: str, option: str) -> None:
    cfg = ModelConfig("t", 64, 4, 8, 2, 16, 96, 11, qk_norm=qk_norm)
    B, T = 2, 32
    model = Decoder(cfg, FUSED, has_embedding=False, has_head=False).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    model.set_rope(cfg.rope, T)
    set_recompute(model, mode, option, preserve_rng_state=False, early_stop=True)
    x = torch.randn(B, T, cfg.dim, dtype=dtype, requires_grad=True)
    positions = torch.arange(T).expand(B, T)
    with _Alive([x, positions, *model.parameters(), *model.buffers()]) as alive:
        out = model(x, positions)
        measured = alive.bytes()
    assert out.shape == x.shape  # `out` stands in for `x`, which was made before: layer inputs are counted once each
    sizes = Bytes(compute=dtype.itemsize)
    (expected,) = estimate(cfg, layout(), seq_len=T, rows=B, recompute=(mode, option), sizes=sizes)
    head = B * T * 2 * cfg.dim * dtype.itemsize
    assert measured == expected.activations - head


def test_gathered_inputs_are_not_divided() -> None:
    assert saved_bytes(LLAMA_8B, 8, keep_gathered=True) - saved_bytes(LLAMA_8B, 8) == 4 * 4096 * 7 // 8
