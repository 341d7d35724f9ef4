"""The loss of each source: its sums by hand, their key, and the plain loss untouched by them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from training import TINY, train, write_nanoset

from megastage.data.batch import Batch
from megastage.loss import ModelPart
from megastage.metrics import scalars
from megastage.model.config import ModelConfig
from megastage.model.decoder import Decoder
from megastage.source_loss import by_source, source_sums

B, T, V = 6, 12, 61


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, T), generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.3] = -100
    labels[4] = -100  # a source whose only row has no label
    bounds = torch.tensor([[0, T]] * B, dtype=torch.int32)
    source = torch.tensor([0, 3, 0, 1, 4, 3], dtype=torch.int32)
    return Batch(tokens, labels, bounds, source, torch.arange(B))


@pytest.fixture
def part() -> ModelPart:
    cfg = ModelConfig("tiny", 32, 2, 4, 2, 8, 48, V)
    decoder = Decoder(cfg)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    decoder.set_rope(cfg.rope, T)
    return ModelPart(decoder, None)


def forward(part: ModelPart, given: Batch) -> torch.Tensor:
    return part(given.tokens_BT, given.positions_BT, given.cu_seqlens_BC, given.labels_BT)


def test_the_loss_of_each_source_is_that_of_its_rows_alone(part):
    given = batch()
    part.row_losses = []
    total = sum(forward(part, micro) for micro in given.split(4))  # micro-batches of 4 and 2 rows
    sums = source_sums(given, part.row_losses, 5, count_labels=True)
    found = by_source(["a", "b", "c", "d", "e"], sums.flatten().tolist())
    logits = part.decoder.logits(part.decoder(given.tokens_BT, given.positions_BT, given.cu_seqlens_BC))
    expected = {}
    for name, rows in (("a", [0, 2]), ("b", [3]), ("d", [1, 5])):
        expected[name] = F.cross_entropy(logits[rows].flatten(0, 1), given.labels_BT[rows].flatten()).item()
    assert found == pytest.approx(expected, rel=1e-5)  # no "c", which has no row, and no "e", which has no label
    assert sums[0].sum().item() == pytest.approx(total.item(), rel=1e-6)


def test_ranks_join_to_the_whole(part):
    """A rank of rows, one without the head, and two that share their labels, one of which counts."""
    given = batch(3)
    part.row_losses = []
    forward(part, given)
    [losses_B] = part.row_losses
    whole = source_sums(given, [losses_B], 5, count_labels=True)
    top, rest = given.split(4)
    parts = [
        source_sums(top, [losses_B[:4]], 5, count_labels=True),
        source_sums(rest, [losses_B[4:] / 2], 5, count_labels=True),
        source_sums(rest, [losses_B[4:] / 2], 5, count_labels=False),
        source_sums(given, (), 5, count_labels=False),
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


def test_asking_for_rows_leaves_loss_and_gradients_alone(part):
    given, results = batch(2), []
    for rows in (None, []):
        part.zero_grad()
        part.row_losses = rows
        loss = forward(part, given)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in part.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not rows[0].requires_grad


def test_other_places_get_one_figure_a_source():
    record = {"step": 3, "loss": 2.0, "loss_by_source": {"/data/web": 1.5, "/data/code": 2.5}}
    assert scalars(record) == {"loss": 2.0, "loss_by_source//data/web": 1.5, "loss_by_source//data/code": 2.5}


@pytest.mark.dist
def test_the_key_changes_nothing_else(tmp_path):
    folders = [str(write_nanoset(tmp_path / name, 20_000, seed)) for name, seed in (("web", 1), ("code", 2))]
    argv = [
        *TINY, "--training.dataset_type", "nanoset", "--training.dataset_folders", ",".join(folders),
        "--training.dataset_weights", "0.75,0.25", "--training.steps", "4", "--training.seq_len", "64",
        "--training.local_batch_size", "2",
    ]  # fmt: skip
    on = train(1, [*argv, "--job.dump_folder", str(tmp_path / "on")])
    off = train(1, [*argv, "--job.dump_folder", str(tmp_path / "off"), "--metrics.per_source_loss", "false"])
    found = [set(record["loss_by_source"]) for record in on]
    assert sorted(map(len, found)) == [1, 1, 2, 2]  # every fourth row is code's
    assert all(names <= set(folders) for names in found)
    assert not any("loss_by_source" in record for record in off)
    exact = ("step", "loss", "grad_norm", "sample_digest", "valid_labels")
    assert json.dumps([[r[k] for k in exact] for r in on]) == json.dumps([[r[k] for k in exact] for r in off])
