"""Command-line overrides, their laying over the file, and reading of TOML."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastage.config.fields import all_keys
from megastage.config.load import ConfigError, load_config

BASE = """
[training]
dataset_type = "nanoset"
dataset_folders = ["/a", "/b"]
steps = 100
[[training.data_stages]]
name = "one"
start_step = 0
[[training.data_stages]]
name = "two"
start_step = 50
[checkpoint]
enable_checkpoint = true
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    file = tmp_path / "base.toml"
    file.write_text(BASE)
    return str(file)


def problems(argv: list[str], world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(argv, world_size)
    return caught.value.problems


def test_config_and_job_config_file_are_the_same(base: str) -> None:
    first, second = load_config(["--config", base]), load_config([f"--job.config_file={base}"])
    assert first == second
    assert first.job.config_file == base


def test_without_a_file_everything_is_default() -> None:
    cfg = load_config([])
    assert cfg.model_fields_set == set()
    assert (cfg.training.dataset, cfg.training.dataset_type, cfg.training.seq_len) == ("c4_test", "huggingface", 2048)


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--training.seq_len", "1024"], "training.seq_len", 1024),
        (["--training.seq_len=1_024"], "training.seq_len", 1024),
        (["--training.seq-len", "1024"], "training.seq_len", 1024),
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--training.max_norm", "inf"], "training.max_norm", float("inf")),
        (["--training.dataset_folders", "/x,/y"], "training.dataset_folders", ("/x", "/y")),
        (["--training.dataset_folders", '["/x", "/y"]'], "training.dataset_folders", ("/x", "/y")),
        (["--training.dataset_weights", "0.5, 0.5"], "training.dataset_weights", (0.5, 0.5)),
        (["--training.dataset_weights", "[1, 2]"], "training.dataset_weights", (1.0, 2.0)),
        (["--checkpoint.enable"], "checkpoint.enable", True),
        (["--checkpoint.enable", "true"], "checkpoint.enable", True),
        (["--checkpoint.no-enable"], "checkpoint.enable", False),
        (["--checkpoint.enable=false"], "checkpoint.enable", False),
        (["--checkpoint.enable", "false", "--training.steps", "90"], "checkpoint.enable", False),
        (["--checkpoint.no-enable-checkpoint"], "checkpoint.enable", False),
        (["--training.compile"], "compile.enable", True),
        (["--training.seed", "3"], "debug.seed", 3),
        (["--model.rope_scaling.kind", "yarn", "--model.rope_scaling.factor", "4"], "model.rope_scaling.factor", 4.0),
        (["--model.rope_scaling", '{"kind": "linear", "factor": 2}'], "model.rope_scaling.kind", "linear"),
        (["--parallelism.pipeline_parallel_schedule", "GPipe"], "parallelism.pipeline_parallel_schedule", "GPipe"),
        (["--training.steps", "90", "--training.steps", "80"], "training.steps", 80),
        (["--training.dataset_folders", "/x", "/y"], "training.dataset_folders", ("/x", "/y")),
        (
            ["--training.dataset_folders", "/x", "--training.dataset_folders=/y"],
            "training.dataset_folders",
            ("/x", "/y"),
        ),
        (
            ["--training.dataset_weights", "0.5", "1,2", "--training.steps=90"],
            "training.dataset_weights",
            (0.5, 1.0, 2.0),
        ),
        (["--checkpoint.no-enable", "true"], "checkpoint.enable", False),
        (["--checkpoint.enable", "--checkpoint.no-enable"], "checkpoint.enable", False),
        (["--job.description", ""], "job.description", ""),
        (["--job.description=--a=b"], "job.description", "--a=b"),
    ],
)
def test_overrides(base: str, arguments: list[str], path: str, value: object) -> None:
    weights = [] if path != "training.dataset_weights" else ["--training.dataset_folders", *"abc"[: len(value)]]  # type: ignore[arg-type]
    node: object = load_config(["--config", base, *arguments, *weights])
    for name in path.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


def test_stages_by_index_change_one_key(base: str) -> None:
    cfg = load_config(["--config", base, "--training.data_stages.1.seq_len", "1024"])
    assert [stage.seq_len for stage in cfg.training.data_stages] == [None, 1024]
    assert [stage.name for stage in cfg.training.data_stages] == ["one", "two"]
    assert "seq_len" not in cfg.training.data_stages[0].model_fields_set
    assert load_config(["--config", base, "--training.data_stages[1].seq_len=9"]).training.data_stages[1].seq_len == 9


def test_a_stage_can_be_added_by_index(base: str) -> None:
    more = ["--training.data_stages.2.name", "three", "--training.data_stages.2.start_step=75"]
    cfg = load_config(["--config", base, *more])
    assert [stage.start_step for stage in cfg.training.data_stages] == [0, 50, 75]
    assert problems(["--config", base, "--training.data_stages.4.name", "x"]) == [
        "command line: --training.data_stages.4: there are 2 items; use 0 to 2"
    ]


def test_all_stages_as_json(base: str) -> None:
    cfg = load_config(["--config", base, "--training.data_stages", '[{"name": "x", "start_step": 0}]'])
    assert [stage.name for stage in cfg.training.data_stages] == ["x"]
    cfg = load_config(["--config", base, "--training.data_stages", "[]"])
    assert cfg.training.data_stages == ()


def test_a_whole_and_its_parts_at_once(base: str) -> None:
    for order in (1, -1):
        both = [("--training.data_stages", "[]"), ("--training.data_stages.0.seq_len", "8")][::order]
        (problem,) = problems(["--config", base, *(text for pair in both for text in pair)])
        assert "give either the whole or its parts" in problem


def test_the_command_line_wins_across_generations(base: str) -> None:
    """A file's old name and a command line's new one are no contradiction; two in one place are."""
    assert load_config(["--config", base, "--checkpoint.enable=false"]).checkpoint.enable is False
    assert problems(["--checkpoint.enable", "--checkpoint.enable_checkpoint"]) == [
        "checkpoint.enable_checkpoint and checkpoint.enable: two names for one key, both set; "
        "keep checkpoint.enable alone"
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--training.seqlen", "3"], "--training.seqlen is not a known key; did you mean --training.seq_len?"),
        (["--seq_len", "3"], "--seq_len is not a known key; did you mean --training.seq_len?"),
        (["--training.steps"], "--training.steps needs a value (int)"),
        (["--training.steps", "--checkpoint.enable"], "--training.steps needs a value (int)"),
        (["--training.steps", "many"], '--training.steps "many": must be an integer'),
        (["--training.steps", "1.5"], '--training.steps "1.5": must be an integer'),
        (["--optimizer.lr", "high"], '--optimizer.lr "high": must be a number'),
        (["--training.data_stages.two.seq_len", "3"], "stages are counted from 0"),
        (["--checkpoint.enable", "1"], '--checkpoint.enable "1": must be true or false'),
        (["--checkpoint.enable=yes"], '--checkpoint.enable "yes": must be true or false'),
        (["--debug.seed", "None"], '--debug.seed "None": must be an integer; leave the key out for its default'),
        (["--training.dataset_weights", "[0.5"], "must be a list as JSON"),
        (["--model.rope_scaling", "[]"], "must be a table as JSON"),
        (["config.toml"], "'config.toml' is not of the form --section.key value; the configuration is given as"),
        (["-x"], "'-x' is not of the form"),
        (["--config", "/nowhere/c.toml"], "/nowhere/c.toml: there is no such file"),
        (["--config", "/"], "/: can't be read as a text file"),
    ],
)
def test_wrong_arguments(argument: list[str], message: str) -> None:
    (problem,) = problems(argument)
    assert message in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nsteps = = 3\n", "line 2: not valid TOML"),
        ("[training]\n\nsteps 3\n", "line 3: not valid TOML"),
        ("[training]\ndataset_path = None\n", "TOML has no None: leave the key out"),
        ("[checkpoint]\nenable = True\n", "TOML writes true and false in lower case"),
        ("[training]\nsteps = 3\nsteps = 4\n", "line 3: not valid TOML"),
        ("[training\n", "not valid TOML"),
    ],
)
def test_syntax_errors_name_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(text)
    (problem,) = problems(["--config", str(file)])
    assert problem.startswith(f"{file}: ")
    assert message in problem


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(["--config", str(file)])
    assert "can't be read as a text file" in problem


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        '[trainin]\nx = 1\n[training]\nstepz = 1\nseq_len = "long"\ndataset = "None"\n[optimizer]\nlr = -1.0\n'
    )
    found = problems(["--config", str(file), "--nothing.here", "1"])
    assert len(found) == 6
    with pytest.raises(ConfigError, match=r"6 problems in the configuration \(.*c\.toml\)"):
        load_config(["--config", str(file), "--nothing.here", "1"])


def test_typos_and_contradictions_come_together(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[training]\nstepz = 1\n[parallelism]\ntensor_parallel_degree = 3\n[model]\nflavor = "9B"\n')
    found = problems(["--config", str(file)], world_size=4)
    assert len(found) == 3
    assert any("4 ranks can't be divided" in problem for problem in found)


def test_a_wrong_value_hides_no_other_problem(tmp_path: Path) -> None:
    """What contradicts is told beside what can't be read, and nothing that only follows from that."""
    file = tmp_path / "c.toml"
    file.write_text("""
[training]
steps = "many"
seq_len = "long"
dataset_type = "nanoset"
dataset_folders = ["/a", "/b"]
dataset_weights = [0.5, nan]
[parallelism]
tensor_parallel_degree = 3
[float8]
emulate = true
[[training.data_stages]]
name = "a"
start_step = 0
end_step = 40
[[training.data_stages]]
name = "a"
start_step = 50
end_step = 80.5
dataset_folders = "/x"
dataset_weights = [1, 2, 3]
[[training.data_stages]]
name = 3
start_step = 70
dataset_weights = [1]
""")
    found = problems(["--config", str(file)], 3)
    expected = [
        "training.steps = ", "training.seq_len = ", "training.data_stages[1].end_step = 80.5",
        "training.data_stages[1].dataset_folders = ", "training.data_stages[2].name = 3",
        "training.data_stages[0].end_step = 40: a gap", 'training.data_stages[1].name = "a": already',
        "training.dataset_weights = [0.5, nan]: nan", "training.data_stages[2].dataset_weights = [1.0]: 1 weights",
        "float8.emulate", "parallelism.tensor_parallel_degree = 3: llama3 debugmodel has 8 query heads",
    ]  # fmt: skip
    for start in expected:
        assert sum(problem.startswith(start) for problem in found) == 1, start
    assert len(found) == len(expected), "\n".join(found)


def test_a_stage_without_a_start_leaves_the_other_tables_to_be_checked(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[[training.data_stages]]\nname = "a"\n[optimizer]\nname = "Adam"\n[training]\nsteps = 5\n')
    assert [problem.partition(":")[0] for problem in problems(["--config", str(file)], 1)] == [
        "training.data_stages[0].start_step", 'optimizer.name = "Adam"',
    ]  # fmt: skip


def test_missing_data_is_told_beside_other_problems(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    (tmp_path / "empty").mkdir()
    file = tmp_path / "c.toml"
    text = f"""
[training]
steps = 100
dataset_type = "nanoset"
dataset_folders = ["{tmp_path}/there", "{tmp_path}/gone"]
[[training.data_stages]]
name = "one"
start_step = 0
end_step = 40
[[training.data_stages]]
name = "two"
start_step = 50
dataset_folders = ["{tmp_path}/gone", "{tmp_path}/empty"]
[[training.data_stages]]
name = "three"
start_step = 60
dataset_type = "huggingface"
dataset = "some/name"
[[training.data_stages]]
name = "never"
start_step = 200
dataset_path = "/nowhere"
"""
    absent = [
        f"stage 1 'one', dataset_folders[1]: {tmp_path}/gone: no such file or folder",
        f"stage 2 'two', dataset_folders[1]: {tmp_path}/empty: an empty folder",
    ]
    for more, others in (("", 1), ("[optimizer]\nlr = -1.0\n", 2)):
        file.write_text(text + more)
        with pytest.raises(ConfigError) as caught:
            load_config(["--config", str(file)], 1, look_for_data=True)
        assert caught.value.problems[others:] == absent
    file.write_text(text.replace("end_step = 40", "end_step = 50"))
    load_config(["--config", str(file)], 1, look_for_data=True)  # for the run to see


def test_the_command_line_and_a_broken_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[training]\nsteps = 3\nsteps = 4\n")
    syntax, argument = problems(["--config", str(file), "--nothing.here", "1"])
    assert "line 3: not valid TOML" in syntax
    assert "the key stands twice in its table" in syntax
    assert "--nothing.here is not a known key" in argument


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert len(all_keys()) > 230
    for path, info in all_keys().items():
        assert f"--{path}  " in text
        assert info.doc, path
        assert len(info.doc) < 100, path
    assert "--training.seq_len  int, default 2048\n" in text
    assert "(also --checkpoint.enable_checkpoint)" in text
    assert "--training.data_stages.N.name  string, required" in text


def test_a_byte_order_mark_is_no_syntax(tmp_path):
    file = tmp_path / "windows.toml"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_config(["--config", str(file)]).training.steps == 100


def test_two_configuration_files(base, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(BASE)
    expected = f'command line: --config is given twice, "{base}" and "{other}"; keep one'
    assert problems(["--config", base, "--job.config_file", str(other)]) == [expected]
    assert load_config(["--config", base, "--config", base]).training.steps == 100
