"""min_doc_len, long_doc_len and long_doc_share: inheritance, what goes together, plan, transition and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastage.config.layout import resolve_layout
from megastage.config.load import ConfigError, load_config
from megastage.stages import compare, fingerprint, record, resolve_stages, stage_notes, transition_text

BASE = '[training]\ndataset_type = "packed_memmap"\ndataset_folders = ["/a"]\nsteps = 100\n'
ONE = '[[training.data_stages]]\nname = "one"\nstart_step = 0\nend_step = 50\n'
TWO = '[[training.data_stages]]\nname = "two"\nstart_step = 50\n'
QWEN = "min_doc_len = 4096\nlong_doc_len = 16384\nlong_doc_share = 0.75\n"


@pytest.fixture
def resolve(tmp_path: Path):
    def resolve(text: str):
        file = tmp_path / "c.toml"
        file.write_text(text)
        cfg = load_config(["--config", str(file)], 1)
        return resolve_stages(cfg, resolve_layout(cfg, 1), seed=1)

    return resolve


def keys(stage) -> tuple:
    return stage.min_doc_len, stage.long_doc_len, stage.long_doc_share


def test_inheritance(resolve) -> None:
    one, two = resolve(BASE + QWEN + ONE + TWO + "min_doc_len = 0\nlong_doc_share = 0.5\n")
    assert keys(one) == (4096, 16384, 0.75)
    assert keys(two) == (0, 16384, 0.5)
    assert set(one.inherited) >= {"min_doc_len", "long_doc_len", "long_doc_share"}
    assert set(two.inherited) & {"min_doc_len", "long_doc_len", "long_doc_share"} == {"long_doc_len"}
    one, two = resolve(BASE + ONE + TWO + QWEN)
    assert keys(one) == (0, 0, None)
    assert keys(two) == (4096, 16384, 0.75)


def test_a_stage_switches_the_share_off(resolve) -> None:
    _, two = resolve(BASE + QWEN + ONE + TWO + "long_doc_len = 0\n")
    assert keys(two) == (4096, 0, None)
    assert "training.long_doc_share = 0.75 is not used: long_doc_len is 0" in two.notes


def test_what_a_type_cannot_use_is_shown_when_inherited_and_an_error_when_set(resolve) -> None:
    _, two = resolve(BASE + QWEN + ONE + TWO + 'dataset_type = "nanoset"\n')
    assert keys(two) == (0, 0, None)
    for name, value in (("min_doc_len", "4096"), ("long_doc_len", "16384"), ("long_doc_share", "0.75")):
        note = f'Note: training.{name} = {value} is not used: dataset_type "nanoset" is not read document by document'
        assert note in stage_notes(two)
    with pytest.raises(ConfigError) as caught:
        resolve(BASE + ONE + TWO + 'dataset_type = "nanoset"\n' + QWEN)
    assert len(caught.value.problems) == 3
    assert caught.value.problems[0] == (
        'training.data_stages[1].min_doc_len = 4096: dataset_type "nanoset" is not read document by document; '
        "take it out, or use packed_memmap or preprocessed data"
    )
    resolve(BASE + ONE + TWO + 'dataset_type = "nanoset"\nmin_doc_len = 0\n')  # what it does anyway


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "long_doc_share = 0.5\n", "training.long_doc_share = 0.5: long_doc_len is 0; set long_doc_len"),
        (BASE + "long_doc_len = 9\n", "training.long_doc_len = 9: there is no long_doc_share; set long_doc_share"),
        (
            BASE + ONE + TWO + "long_doc_share = 0.5\n",
            "training.data_stages[1].long_doc_share = 0.5: long_doc_len is 0; set",
        ),
        (
            BASE + ONE + TWO + "long_doc_len = 50\nlong_doc_share = 0.5\nmin_doc_len = 50\n",
            "training.data_stages[1]: long_doc_len = 50 and min_doc_len = 50: no document could be short",
        ),
        (BASE + "long_doc_len = 9\nlong_doc_share = 1.5\n", "training.long_doc_share = 1.5: must be at most 1"),
        (BASE + "min_doc_len = -1\n", "training.min_doc_len = -1: must be at least 0"),
        (
            BASE.replace("packed_memmap", "megatron") + "min_doc_len = 5\n",
            'training.min_doc_len = 5: dataset_type "megatron" is not read document by document',
        ),
    ],
)
def test_what_does_not_go_together(resolve, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(text)
    (problem,) = caught.value.problems
    assert words in problem


def test_plan_and_transition(resolve) -> None:
    one, two = resolve(BASE + ONE + TWO + QWEN + "lr = 1e-4\n")
    assert stage_notes(two)[2] == "Documents: at least 4,096 tokens, 0.75 of the rows of those of at least 16,384"
    assert not any(line.startswith("Documents") for line in stage_notes(one))
    assert transition_text(50, one, two).splitlines()[4:-1] == [
        "Changes: lr, min_doc_len, long_doc_len, long_doc_share",
        "New lr: 0.0001",
        "New min_doc_len: 0 -> 4096",
        "New long_doc_len: 0 -> 16384",
        "New long_doc_share: none -> 0.75",
    ]


def test_resume(resolve) -> None:
    plain, ruled = resolve(BASE + ONE + TWO), resolve(BASE + ONE + TWO + QWEN)
    assert fingerprint(plain[1]) != fingerprint(ruled[1])
    assert fingerprint(plain[0]) == fingerprint(ruled[0])
    saved = [record(stage) for stage in plain]
    for entry in saved:  # as before these keys were there
        for name in ("min_doc_len", "long_doc_len", "long_doc_share"):
            del entry[name]
    assert compare(saved, plain, 70) == ([], [])
    problems, _ = compare(saved, ruled, 70)
    assert problems[0].startswith("stage 'two': min_doc_len was 0 and is 4096, but the stage has begun")
    assert len(problems) == 3
    assert compare(saved, ruled, 50)[0] == []
    assert "stage 'two': min_doc_len 0 -> 4096" in compare(saved, ruled, 50)[1]
