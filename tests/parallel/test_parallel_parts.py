"""The pieces of the parallel layouts against the same computation on one rank."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megastage import boundary, build, runtime
from megastage.config.layout import Layout, resolve_layout
from megastage.config.load import load_config
from megastage.config.model_choice import model_config
from megastage.model.decoder import Decoder
from megastage.optim import Optimizer, clip_scale, gradient_norm
from megastage.parallel import tensor
from megastage.parallel.collectives import gather_sequence, reduce_scatter_sequence
from megastage.parallel.context import ContextGroup, make_groups
from megastage.parallel.mesh import build_mesh
from megastage.parallel.placement import initialise, local_window, whole_tensor
from megastage.parallel.tied import find_tied
from ranks import run_ranks

pytestmark = pytest.mark.dist

MODEL = [
    "--model.dim", "48", "--model.n_layers", "4", "--model.n_heads", "4", "--model.n_kv_heads", "2",
    "--model.head_dim", "12", "--model.ffn_dim", "101", "--model.vocab_size", "1025", "--model.qk_norm",
    "--training.mixed_precision_param", "float32",
]  # fmt: skip


def _model(layout: list[str], world: int, seed: int = 3) -> tuple[build.Model, object]:
    cfg = load_config([*MODEL, *layout], world)
    rt = runtime.start(device_type="cpu")
    mesh = build_mesh(resolve_layout(cfg, world), "cpu")
    model = build.build_model(cfg, model_config(cfg), mesh, rt.device)
    initialise(model.decoder, model.cfg, seed)
    return model, mesh


def _whole_parameters(layout: list[str], world: int) -> dict[str, np.ndarray]:
    """Every parameter assembled, and this rank's window checked against it."""
    model, _ = _model(layout, world)
    result = {}
    for name, parameter in model.parameters.items():
        assert isinstance(parameter, DTensor)
        whole = whole_tensor(parameter.detach())
        torch.testing.assert_close(parameter.to_local(), whole[local_window(parameter)], rtol=0, atol=0)
        result[name] = whole.numpy()
    return result


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (4, ["--parallelism.tensor_parallel_degree", "2"]),
        (4, ["--parallelism.data_parallel_replicate_degree", "2"]),
        (3, []),
        (6, ["--parallelism.tensor_parallel_degree", "2", "--model.vocab_size", "517"]),
    ],
    ids=["dp2tp2", "hsdp", "dp3", "dp3tp2"],
)
def test_a_seed_gives_the_same_weights_on_every_layout(world, layout):
    """Rows that don't divide (1025, 101) included; every rank's window is where it says it is."""
    sizes = layout[layout.index("--model.vocab_size") :] if "--model.vocab_size" in layout else []
    one = run_ranks(1, _whole_parameters, sizes, 1)[0]
    for rank in run_ranks(world, _whole_parameters, layout, world):
        assert rank.keys() == one.keys()
        for name, value in rank.items():
            np.testing.assert_array_equal(value, one[name], err_msg=name)


def _collectives() -> list[float]:
    rt = runtime.start(device_type="cpu")
    group, n = dist.group.WORLD, rt.world_size
    torch.manual_seed(0)
    whole = torch.randn(2, 4 * n, 3, dtype=torch.float64)
    mine = whole.chunk(n, 1)[rt.rank].clone().requires_grad_()
    gathered = gather_sequence(mine, group)
    weight = torch.arange(float(whole.numel()), dtype=torch.float64).view_as(whole) * (rt.rank + 1)
    (gathered * weight).sum().backward()
    total = sum(range(1, n + 1))
    expected = (weight / (rt.rank + 1) * total).chunk(n, 1)[rt.rank]
    partial = (whole * (rt.rank + 1)).requires_grad_()
    scattered = reduce_scatter_sequence(partial, group)
    scattered.backward(whole.chunk(n, 1)[rt.rank])
    return [
        (gathered - whole).abs().max().item(),
        (mine.grad - expected).abs().max().item(),
        (scattered - whole.chunk(n, 1)[rt.rank] * total).abs().max().item(),
        (partial.grad - whole).abs().max().item(),
    ]


def test_sequence_collectives_and_their_gradients():
    for errors in run_ranks(3, _collectives):
        assert max(errors) < 1e-12


def _norm_and_step(layout: list[str], world: int) -> tuple[float, float, dict[str, np.ndarray]]:
    model, mesh = _model(layout, world)
    optimizer = Optimizer(
        model.parameters, name="AdamW", lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, implementation="fused"
    )
    for _ in range(2):
        for name, parameter in model.parameters.items():
            whole = _gradient(name, tuple(parameter.shape))
            local = whole[local_window(parameter)].clone()
            parameter.grad = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
        norm = gradient_norm(model.parameters, mesh, model.tied.counted_elsewhere)
        optimizer.step(1e-2, 0.1, clip_scale(norm, 1.0))
    state = optimizer.state_tensors()
    whole = {name: p.full_tensor().detach().numpy() for name, p in model.parameters.items()}
    moment = {key: value.full_tensor().numpy() for key, value in state.items()}
    return norm.item(), float(optimizer.steps), whole | moment


def _gradient(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def test_optimizer_and_norm_against_torch():
    """Clipped AdamW of whole tensors by torch itself, against shards on DP2 x TP2."""
    cfg = model_config(load_config(MODEL, 1))
    decoder = Decoder(cfg)
    initialise(decoder, cfg, 3)
    reference = torch.optim.AdamW(decoder.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(2):
        for name, parameter in decoder.named_parameters():
            parameter.grad = _gradient(name, tuple(parameter.shape))
        expected_norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0).item()
        reference.step()
    for norm, steps, tensors in run_ranks(4, _norm_and_step, ["--parallelism.tensor_parallel_degree", "2"], 4):
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert steps == 2
        for name, parameter in decoder.named_parameters():
            np.testing.assert_allclose(tensors[name], parameter.detach().numpy(), rtol=2e-5, atol=1e-7, err_msg=name)
            moment = reference.state[parameter]["exp_avg"].numpy()
            np.testing.assert_allclose(tensors[f"optimizer.exp_avg.{name}"], moment, rtol=1e-5, atol=1e-8)


def _context_groups(world: int) -> list[tuple[int, int, list[int]]]:
    rt = runtime.start(device_type="cpu")
    mesh = build_mesh(Layout(world, 1, 1, world // 2, 1, 2), "cpu")
    groups = make_groups(mesh, [1, 2, 4])
    found = [(d, g.rank, dist.get_process_group_ranks(g.group) if g.group else []) for d, g in sorted(groups.items())]
    rt.close()  # together: rank 0 holds the store that the others still make groups with
    return found


def test_context_groups_are_neighbours_of_the_shard_dimension():
    found = run_ranks(8, _context_groups, 8)
    assert found[0] == [(1, 0, []), (2, 0, [0, 2]), (4, 0, [0, 2, 4, 6])]
    assert found[5] == [(1, 0, []), (2, 0, [5, 7]), (4, 2, [1, 3, 5, 7])]


def _connected() -> tuple[set[str], set[str]]:
    """Names of the groups that a boundary connects on this rank, and of all that the ranks of the run share."""
    cfg = load_config([*MODEL, "--parallelism.pipeline_parallel_degree", "2", "--model.tied_embeddings"], 8)
    rt = runtime.start(device_type="cpu")
    mesh = build_mesh(resolve_layout(cfg, 8), "cpu")
    context, tied = make_groups(mesh, [2, 4])[2], find_tied(True, mesh)
    connected: set[str] = set()
    plain = boundary.dist.all_reduce
    boundary.dist.all_reduce = lambda _value, group: connected.add(group.group_name)
    boundary.connect(SimpleNamespace(mesh=mesh, runtime=rt, context=context, model=SimpleNamespace(tied=tied)))
    boundary.dist.all_reduce = plain
    used = [dist.group.WORLD, *mesh.root.get_all_groups(), mesh.data.get_group(), context.group, tied.group]
    names = {group.group_name for group in used if group is not None}
    rt.close()
    return connected, names


def test_a_boundary_connects_every_group_that_updates_use():
    """FSDP's, the rows' and the tied embedding's too: a first collective inside an update may be slow."""
    for connected, used in run_ranks(8, _connected):
        assert connected == used
        assert len(used) >= 6


def test_context_slices_cover_a_row_once_and_even_out_causal_work():
    for degree in (2, 4, 8):
        seen = np.zeros(128, int)
        work = []
        for rank in range(degree):
            slices = ContextGroup(degree, rank, None).slices(128)
            for part in slices:
                seen[part] += 1
            work.append(sum(sum(range(part.start + 1, part.stop + 1)) for part in slices))
        assert seen.tolist() == [1] * 128
        assert len(set(work)) == 1


def test_every_parameter_has_one_style():
    cfg = model_config(load_config(MODEL, 1))
    with torch.device("meta"):
        decoder = Decoder(cfg)
    names = {name.removesuffix(".weight") for name, _ in decoder.named_parameters()}

    for name in names:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _, _ in tensor.STYLES) == 1, name
