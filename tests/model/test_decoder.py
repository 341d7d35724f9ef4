"""The decoder alone: parts, packed documents, recomputation, compilation, mixed precision, memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megastage.model.config import ModelConfig, RopeSpec
from megastage.model.decoder import Decoder
from megastage.model.ops import Ops

CFG = ModelConfig("tiny", 32, 4, 4, 2, 8, 48, 61, qk_norm=True)


def build(cfg: ModelConfig = CFG, positions: int = 64, seed: int = 0, **kwargs) -> Decoder:
    with torch.device("meta"):
        model = Decoder(cfg, **kwargs)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    model.set_rope(cfg.rope, positions)
    return model


def batch(ends: list[int], T: int, cfg: ModelConfig = CFG) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row of T tokens with documents up to `ends`: tokens, positions that restart, cu_seqlens."""
    tokens = torch.randint(cfg.vocab_size, (1, T), generator=torch.Generator().manual_seed(T))
    starts = [0, *ends]
    positions = torch.cat([torch.arange(n) for n in (b - a for a, b in zip(starts, [*ends, T]))])
    return tokens, positions[None], torch.tensor([[*starts, ends[-1]]], dtype=torch.int32)


def loss_and_grads(model: Decoder, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model.logits(model(*inputs))
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits.float() * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_state_dict_names_are_those_of_the_whole_model() -> None:
    whole = build()
    first, last = build(layers=range(1), has_head=False), build(layers=range(1, 4), has_embedding=False)
    names = list(first.state_dict()) + list(last.state_dict())
    assert names == list(whole.state_dict())
    assert "layers.3.attention.q_norm.weight" in names
    assert not any("rope" in name for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_parts_compute_the_whole(tied: bool) -> None:
    cfg = ModelConfig("tiny", 32, 4, 4, 2, 8, 48, 61, tied_embeddings=tied)
    whole = build(cfg)
    parts = [
        build(cfg, layers=range(1), has_head=False, seed=1),
        build(cfg, layers=range(1, 3), has_embedding=False, has_head=False, seed=2),
        build(cfg, layers=range(3, 4), has_embedding=False, seed=3),
    ]
    assert ("tok_embeddings.weight" in parts[2].state_dict()) == tied
    for part in parts:
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    tokens, positions, cu = batch([20, 33], 40, cfg)
    x = tokens
    for part in parts:
        x = part(x, positions, cu)
    torch.testing.assert_close(parts[2].logits(x), whole.logits(whole(tokens, positions, cu)), rtol=0, atol=0)


def test_packed_documents_equal_separate_documents() -> None:
    model = build()
    tokens, positions, cu = batch([7, 8, 30], 30)
    packed, packed_grads = loss_and_grads(model, tokens, positions, cu)
    model.zero_grad()
    weights = torch.linspace(-1, 1, packed.numel()).view_as(packed)
    for start, end in [(0, 7), (7, 8), (8, 30)]:
        alone = model.logits(model(tokens[:, start:end], torch.arange(end - start)[None]))
        torch.testing.assert_close(alone, packed[:, start:end], rtol=1e-5, atol=1e-5)
        (alone * weights[:, start:end]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, packed_grads[name], rtol=1e-4, atol=1e-5)


def test_padding_tail_touches_no_document() -> None:
    model = build()
    tokens, positions, cu = batch([9, 20], 32)
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % CFG.vocab_size
    torch.testing.assert_close(
        model(tokens, positions, cu)[:, :20], model(other, positions, cu)[:, :20], rtol=0, atol=0
    )


def test_recomputation_changes_no_bit() -> None:
    model = build()
    inputs = batch([11, 32], 32)
    plain, plain_grads = loss_and_grads(model, *inputs)
    for layer in model.layers.values():
        layer.recompute = partial(checkpoint, use_reentrant=False)
    again, again_grads = loss_and_grads(model, *inputs)
    assert torch.equal(plain, again)
    assert all(torch.equal(plain_grads[name], again_grads[name]) for name in plain_grads)


@pytest.mark.parametrize("recompute", [None, partial(checkpoint, use_reentrant=False)])
def test_compiled_layers_agree(recompute) -> None:
    model = build()
    for layer in model.layers.values():
        layer.recompute = recompute
    inputs = batch([11, 32], 32)
    plain, plain_grads = loss_and_grads(model, *inputs)
    for layer in model.layers.values():
        layer.compile(backend="aot_eager")
    compiled, compiled_grads = loss_and_grads(model, *inputs)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(compiled_grads, plain_grads)
    torch._dynamo.reset()


def test_bf16_parameters_keep_fp32_tables() -> None:
    model = build()
    inputs = batch([11, 32], 32)
    wide, _ = loss_and_grads(model, *inputs)
    model.bfloat16()
    model.set_rope(CFG.rope, 64)
    narrow, grads = loss_and_grads(model, *inputs)
    assert narrow.dtype == torch.bfloat16
    assert all(grad.dtype == torch.bfloat16 for grad in grads.values())
    assert model.layers["0"].attention.rope_cos.dtype == torch.float32
    assert (narrow - wide).abs().mean() < 0.03 * wide.abs().mean()


def test_set_rope_shares_one_table_and_changes_the_result() -> None:
    model = build()
    tokens, positions, cu = batch([40], 40)
    before = model(tokens, positions, cu)
    model.set_rope(RopeSpec(theta=1e6), 128)
    tables = {layer.attention.rope_cos.data_ptr() for layer in model.layers.values()}
    assert len(tables) == 1
    assert model.layers["3"].attention.rope_cos.shape == (128, 4)
    assert not torch.allclose(before, model(tokens, positions, cu))


class _LargestPair(TorchDispatchMode):
    """Remembers the second largest dimension of any tensor an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.second = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() > 1:
                self.second = max(self.second, sorted(x.shape)[-2])
        return out


def _dense_attention(q, k, v, cu):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    return torch.einsum("bhts,bshd->bthd", scores, v)


@pytest.mark.parametrize("dense", [False, True])
def test_document_rows_never_form_a_square_of_the_row_length(dense: bool) -> None:
    S = 2048
    cfg = ModelConfig("tiny", 16, 1, 2, 1, 8, 16, 31)
    model = build(cfg, positions=S)
    if dense:  # the detector must see what it looks for
        model.set_ops(replace(Ops(), attention=_dense_attention))
    tokens, positions, cu = batch([700, 1024, 1025, 1800], S, cfg)
    with _LargestPair() as seen:
        model.logits(model(tokens, positions, cu)).sum().backward()
    assert (seen.second >= S) == dense
    assert seen.second > 0
