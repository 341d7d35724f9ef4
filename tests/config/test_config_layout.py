"""Layout on ranks, layers on pipeline parts, sizes of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megastage.config.checks import check
from megastage.config.layout import Layout, pipeline_layers, resolve_layout
from megastage.config.load import ConfigError, load_config
from megastage.config.model_choice import model_config
from megastage.config.schema import Config
from megastage.model.flavors import get_flavor


def parallel(**degrees: object) -> Config:
    return Config.model_validate({"parallelism": degrees})


def test_shard_degree_is_inferred() -> None:
    layout = resolve_layout(parallel(tensor_parallel_degree=2, pipeline_parallel_degree=2), 16)
    assert layout == Layout(world_size=16, pp=2, dp_replicate=1, dp_shard=4, cp=1, tp=2)
    assert (layout.dpcp, layout.data_ranks(1), layout.data_ranks(2)) == (4, 4, 2)
    layout = resolve_layout(parallel(data_parallel_replicate_degree=2, context_parallel_degree=4), 16)
    assert (layout.dp_shard, layout.dpcp, layout.data_ranks(4)) == (2, 16, 4)


@given(
    pp=st.integers(1, 4), tp=st.integers(1, 4), cp=st.integers(1, 4), rep=st.integers(1, 3), world=st.integers(1, 64)
)
def test_layouts_fill_the_world_or_are_refused(pp: int, tp: int, cp: int, rep: int, world: int) -> None:
    cfg = parallel(
        pipeline_parallel_degree=pp,
        tensor_parallel_degree=tp,
        context_parallel_degree=cp,
        data_parallel_replicate_degree=rep,
    )
    if world % (pp * tp * cp * rep):
        with pytest.raises(ConfigError, match="can't be divided"):
            resolve_layout(cfg, world)
    else:
        layout = resolve_layout(cfg, world)
        assert layout.pp * layout.dpcp * layout.tp == world


def sizes(parts: list[range]) -> list[int]:
    return [len(part) for part in parts]


@pytest.mark.parametrize(
    ("n_layers", "degree", "expected"),
    [
        (6, 1, [6]),
        (6, 2, [3, 3]),
        (8, 2, [4, 4]),
        (7, 2, [4, 3]),
        (32, 4, [8, 9, 8, 7]),
        (126, 16, [7] + [8] * 14 + [7]),
        (80, 8, [10, 11, 10, 10, 10, 10, 10, 9]),
        (2, 2, [1, 1]),
        (6, 8, [0, 1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_even_split_counts_embedding_and_head_as_layers(n_layers: int, degree: int, expected: list[int]) -> None:
    parts = pipeline_layers(parallel(pipeline_parallel_degree=degree), n_layers)
    assert sizes(parts) == expected
    assert [layer for part in parts for layer in part] == list(range(n_layers))


def test_split_by_other_keys() -> None:
    assert pipeline_layers(
        parallel(pipeline_parallel_degree=3, pipeline_parallel_split_points=["layers.1", "layers.4"]), 6
    ) == [range(1), range(1, 4), range(4, 6)]
    assert pipeline_layers(
        parallel(
            pipeline_parallel_degree=2,
            module_fqns_per_model_part=[["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "norm", "output"]],
        ),
        3,
    ) == [range(1), range(1, 3)]
    unset = parallel(pipeline_parallel_degree=2, module_fqns_per_model_part=[], pipeline_parallel_split_points=[])
    assert pipeline_layers(unset, 4) == [range(2), range(2, 4)]
    assert sizes(
        pipeline_layers(parallel(pipeline_parallel_degree=3, pipeline_parallel_layers_per_stage=3), 8)
    ) == [3, 3, 2]  # fmt: skip
    no_ends = parallel(
        pipeline_parallel_degree=4,
        pipeline_parallel_first_stage_less_layers=0,
        pipeline_parallel_last_stage_less_layers=0,
    )
    assert sizes(pipeline_layers(no_ends, 8)) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "names",
    [
        [["tok_embeddings", "layers.0"], ["layers.2", "norm", "output"]],
        [["layers.0", "tok_embeddings"], ["layers.1", "layers.2", "norm", "output"]],
        [["tok_embeddings", "layers.0", "layers.1", "layers.2", "norm", "output"]],
    ],
)
def test_wrong_module_names(names: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="module_fqns_per_model_part"):
        pipeline_layers(parallel(pipeline_parallel_degree=2, module_fqns_per_model_part=names), 3)


def test_flavor_and_overrides() -> None:
    assert model_config(load_config(["--model.flavor", "8B"])) == get_flavor("llama3", "8B")
    model = model_config(load_config(["--model.dim", "64", "--model.n_heads=4", "--model.n_kv_heads=2"]))
    assert (model.dim, model.head_dim, model.n_kv_heads, model.n_layers) == (64, 16, 2, 6)
    model = model_config(load_config(["--model.vocab_size=8192", "--model.tied_embeddings", "--model.rope_theta=1e4"]))
    assert (model.vocab_size, model.tied_embeddings, model.rope.theta) == (8192, True, 1e4)


def test_a_model_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r'model\.flavor = "9B" is not known for llama3'):
        model_config(Config.model_validate({"model": {"flavor": "9B"}}))


def test_check_reports_layout_and_stage_problems_together() -> None:
    cfg = Config.model_validate(
        {"parallelism": {"tensor_parallel_degree": 3}, "training": {"dataset_type": "nanoset", "seq_len": 2048}}
    )
    problems = check(cfg, 4)
    assert len(problems) == 4
    for part in ("4 ranks can't be divided", "query heads", "key/value heads", "seq_len = 2048", "needs data"):
        assert any(part in problem for problem in problems)
    assert check(Config(), 1) == []


def test_an_open_batch_is_not_guessed_where_a_checkpoint_will_say_it(tmp_path: Path) -> None:
    """-1 was 2 rows on each of two ranks; on one rank it is not 2 now, which 4 would not divide."""
    table = {"dataset_type": "nanoset", "dataset_path": "/data", "local_batch_size": 2, "steps": 9}
    stages = [{"name": "a", "start_step": 0}, {"name": "b", "start_step": 5, "local_batch_size": 4}]
    tables = {"training": {**table, "data_stages": stages}, "job": {"dump_folder": str(tmp_path)}}
    cfg = Config.model_validate({**tables, "checkpoint": {"enable": True}})
    (problem,) = check(cfg, 1)
    assert "training.global_batch_size = 2: does not divide" in problem
    (tmp_path / "checkpoint" / "step-4").mkdir(parents=True)
    assert check(cfg, 1) == []
    written = Config.model_validate({**tables, "training": {**tables["training"], "global_batch_size": 6}})
    assert "training.global_batch_size = 6: does not divide" in check(written, 1)[0]
    other = {"initial_load_path": "elsewhere", "initial_load_model_only": False}
    tables["job"] = {"dump_folder": str(tmp_path / "new")}
    assert check(Config.model_validate({**tables, "checkpoint": other}), 1) == []


@pytest.mark.parametrize(
    ("heads", "shared", "tp", "fits"),
    [(12, 4, 2, True), (12, 4, 12, True), (12, 4, 6, False), (12, 3, 6, True), (12, 3, 4, False), (12, 1, 4, True)],
)
def test_which_degrees_split_the_heads(heads: int, shared: int, tp: int, fits: bool) -> None:
    """Whole query heads, and whole key/value heads or one that several ranks share."""
    cfg = Config.model_validate(
        {
            "model": {"dim": 96, "n_heads": heads, "n_kv_heads": shared, "head_dim": 8},
            "parallelism": {"tensor_parallel_degree": tp},
            "training": {"dataset_type": "nanoset", "dataset_path": "/data", "seq_len": 96},
        }
    )
    problems = check(cfg, tp)
    assert fits == (problems == [])
    if not fits:
        assert f"has {heads} query heads" in problems[0]
        assert problems[0].endswith(
            f"use one of {[d for d in (1, 2, 3, 4, 6, 12) if shared % d == 0 or d % shared == 0]}"
        )
