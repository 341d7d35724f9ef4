"""Packed rows. Tokens are all different here, so a value tells where in the data it comes from."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megastage.data.engine import DataEngine
from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.sources.base import SourceOptions, open_source
from megastage.preprocess.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from source_files import FakeStage

LENGTHS = np.random.default_rng(3).integers(1, 70, 300)
ENDS = np.cumsum(LENGTHS)
DOCUMENT = np.repeat(np.arange(LENGTHS.size), LENGTHS)  # of each token
PAD = 70_000
Row = dict[str, list[int]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with PackedMemmapWriter(tmp_path / "data", "uint32") as writer:
        writer.extend(np.arange(ENDS[-1]), LENGTHS)
    return tmp_path / "data"


def read_rows(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for file in sorted(folder.glob("data-*")):
        if file.suffix == ".parquet":
            rows += pq.read_table(file).to_pylist()
        else:
            with pa.memory_map(str(file)) as source:
                rows += pa.ipc.open_stream(source).read_all().to_pylist()
    return rows


def pack(data: Path, *arguments: object) -> list[Row]:
    output = data.parent / "rows"
    assert main(["pack", str(data), "--output", str(output), "--overwrite", *map(str, arguments)]) == 0
    return read_rows(output)


def sequences(row: Row, column: str) -> list[list[int]]:
    cuts = np.cumsum(row["sequence_lengths"])
    assert cuts[-1] == len(row[column])
    return [part.tolist() for part in np.split(np.array(row[column]), cuts[:-1])]


@pytest.mark.parametrize("method", ["best-fit", "concatenate"])
@pytest.mark.parametrize("layout", ["input_ids", "inputs"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_every_token_is_in_one_row_with_its_own_label_and_position(
    data: Path, method: str, layout: str, pad: bool, kind: str
) -> None:
    arguments = ["--method", method, "--layout", layout, "--to", kind, *(["--pad-id", PAD] if pad else [])]
    rows = pack(data, "--seq-len", 48, *arguments)
    seen: list[int] = []
    for row in rows:
        assert len(row[layout]) == 48 or (not pad and len(row[layout]) < 48)
        for tokens, labels, positions in zip(
            *(sequences(row, name) for name in (layout, "labels", "position_ids")), strict=True
        ):
            assert positions == list(range(len(tokens)))
            if tokens[0] == PAD:
                assert set(tokens) == {PAD}
                assert set(labels) == {-100}
                continue
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            assert len(set(DOCUMENT[tokens].tolist())) == 1
            seen += tokens
            if layout == "input_ids":
                assert labels == [-100, *tokens[1:]]
            else:
                assert labels == [-100 if token + 1 in ENDS else token + 1 for token in tokens]
    assert sorted(seen) == list(range(ENDS[-1]))
    if method == "concatenate":
        assert seen == list(range(ENDS[-1]))
        assert len(rows) == -(-ENDS[-1] // 48)


def test_best_fit_cuts_only_what_is_longer_than_a_row(data: Path) -> None:
    rows = pack(data, "--seq-len", 48)
    pieces = [tokens for row in rows for tokens in sequences(row, "input_ids")]
    cut = {int(DOCUMENT[tokens[0]]) for tokens in pieces if len(tokens) < LENGTHS[DOCUMENT[tokens[0]]]}
    assert cut == set(np.flatnonzero(LENGTHS > 48).tolist())


@pytest.mark.parametrize("seed", [5, 6])
def test_the_rows_are_those_of_a_training_run(data: Path, seed: int) -> None:
    rows = pack(data, "--seq-len", 64, "--layout", "inputs", "--pad-id", 0, "--seed", seed)
    stage = FakeStage(dataset_type="packed_memmap", dataset_path=str(data), seq_len=64, dataset_random_seed=seed)
    engine = DataEngine.build([stage])
    engine.enter(0, data_rank=0, data_ranks=1)
    steps = len(rows) // 8
    batches = [engine.next() for _ in range(steps)]
    engine.close()
    for name, column in (("tokens_BT", "inputs"), ("labels_BT", "labels")):
        got = [row for batch in batches for row in getattr(batch, name).tolist()]
        assert got == [row[column] for row in rows[: 8 * steps]]


@pytest.mark.parametrize("layout", ["input_ids", "inputs"])
def test_the_trainer_reads_the_rows_as_they_are(data: Path, layout: str) -> None:
    rows = pack(data, "--seq-len", 64, "--layout", layout)
    source = open_source("preprocessed", data.parent / "rows", SourceOptions(cache_folder=data.parent))
    assert source.read(0, source.n_tokens).tolist() == [token for row in rows for token in row[layout]]
    assert source.doc_ends.tolist() == np.cumsum([len(row[layout]) for row in rows]).tolist()
    labels = [label for row in rows for label in row["labels"]]
    if layout == "inputs":
        assert source.labels(0, source.n_tokens).tolist() == labels  # type: ignore[union-attr]
    else:
        assert source.loss_mask(0, source.n_tokens).tolist() == [label != -100 for label in labels]  # type: ignore[union-attr]


def test_hugging_face_loads_the_folder(data: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = pack(data, "--seq-len", 64)
    loaded = datasets.load_from_disk(str(data.parent / "rows"))
    assert len(loaded) == len(rows)
    assert loaded[3] == rows[3]


def test_many_files_hold_the_same_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(data, "--seq-len", 64)
    monkeypatch.setattr("megastage.preprocess.rowfiles.FILE_BYTES", 20_000)
    monkeypatch.setattr("megastage.preprocess.pack._BATCH_TOKENS", 700)
    for kind in ("arrow", "parquet"):
        assert pack(data, "--seq-len", 64, "--to", kind) == whole
        assert len(list((data.parent / "rows").glob("data-*"))) > 3
    assert pack(data, "--seq-len", 48, "--method", "concatenate")[0]["input_ids"] == list(range(48))


def test_the_table_without_output(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(data), "--seq-len", "32", "64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:2] for line in lines] == [[n, m] for n in ("32", "64") for m in ("best-fit", "concatenate")]
    starts = ENDS - LENGTHS
    for length, method, rows, padding, _, cut, _, _ in ([*line, ""][:8] for line in lines):
        n, filled = int(length), int(rows.replace(",", ""))
        crossing = sum(s // n != (e - 1) // n for s, e in zip(starts.tolist(), ENDS.tolist(), strict=True))
        assert int(cut) == (crossing if method == "concatenate" else (n < LENGTHS).sum())
        assert filled >= -(-ENDS[-1] // n)
        assert float(padding) == pytest.approx(100 * (1 - ENDS[-1] / (filled * n)), abs=1e-3)
    assert not (data.parent / "rows").exists()


def test_what_pack_refuses(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "rows")
    for arguments, words in (
        (["--seq-len", "8", "16", "--output", output], "a folder holds rows of one length"),
        (["--seq-len", "8", "--output", output, "--pad-id", "-1"], "--pad-id -1: outside the vocabulary"),
    ):
        assert main(["pack", str(data), *arguments]) == 1
        assert words in capsys.readouterr().err
        assert not Path(output).exists()
    assert main(["pack", str(data), "--seq-len", "8", "--output", output]) == 0
    assert main(["pack", str(data), "--seq-len", "8", "--output", output]) == 1
    assert "exists already" in capsys.readouterr().err
    assert json.loads((tmp_path / "rows" / "dataset_info.json").read_text())["description"].startswith("best-fit rows")
    assert not list(tmp_path.glob(".rows*"))
