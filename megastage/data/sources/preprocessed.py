"""Tokenized rows in Arrow or Parquet files, such as Hugging Face `save_to_disk` folders, read by pyarrow alone.

Two layouts:
- `input_ids` (+ `labels` of the same positions, not shifted; -100 is left out of the loss);
- `inputs` + `labels` already shifted by one, kept as they are.
Rows of different lengths are documents. Rows of one length are packed: they are kept whole (`unit_ends`), and their
documents come from `position_ids` resets, `sequence_lengths` or the end-of-document token, in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megastage.data.sources.base import IGNORED, Part, SourceError, SourceOptions, TokenSource
from megastage.data.sources.columnar import column_names, data_files, record_batches
from megastage.data.sources.decoded import RowFiles

_COLUMNS = ("input_ids", "inputs", "labels", "position_ids", "sequence_lengths")
_MASK = "attention_mask"
_PROBE_ROWS = 64


def open_folder(path: Path | str, options: SourceOptions) -> TokenSource:
    """Open a `save_to_disk` folder or .arrow/.parquet file(s); large ones are mapped, not read."""
    path = Path(path)
    files, rows = data_files(path), RowFiles(_COLUMNS, options)
    _refuse_padding(files[0])
    batches = [_columns(file, batch) for file in files for batch in rows.batches(file) if batch.num_rows]
    if not batches:
        raise SourceError(f"{path}: holds no rows")
    layout = _detect_layout(path, batches, options)
    parts = [_part(batch, layout) for batch in batches]
    return TokenSource(parts, path=path, dataset_type="preprocessed", kind="documents", eos_id=options.eos_id)


def _refuse_padding(file: Path) -> None:
    """Padding in the first rows, which only this column tells from tokens, would be learnt like text."""
    first = next(record_batches(file, (_MASK,)), None) if _MASK in column_names(file) else None
    if first is not None and not _ragged(file, _MASK, first.column(0)[:_PROBE_ROWS]).values.all():
        raise SourceError(f"{file}: rows are padded ('{_MASK}' has zeros); write them without padding; rows are packed")


@dataclass(frozen=True)
class _Ragged:
    """A list column of a batch: row r is values[ends[r-1]:ends[r]]."""

    values: np.ndarray
    ends: np.ndarray

    def row(self, r: int) -> np.ndarray:
        return self.values[self.ends[r - 1] if r else 0 : self.ends[r]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class _Rows:
    file: Path
    columns: dict[str, _Ragged]


@dataclass(frozen=True)
class _Layout:
    tokens: str
    packed: bool  # a row may hold several documents and is kept whole
    shifted: bool  # labels are those of the next position already
    label_only: int  # length of packed rows whose last token is a label, no input; 0 otherwise
    eos_id: int | None


def _columns(file: Path, batch: pa.RecordBatch) -> _Rows:
    columns = {name: _ragged(file, name, batch.column(name)) for name in batch.schema.names}
    if "input_ids" in columns and "inputs" in columns:
        raise SourceError(f"{file}: has both columns 'input_ids' and 'inputs'; keep the one with the tokens")
    if "input_ids" not in columns and "inputs" not in columns:
        raise SourceError(f"{file}: has neither column 'input_ids' nor 'inputs'; is it text? then use 'huggingface'")
    tokens = columns.get("input_ids") or columns["inputs"]
    for name in ("labels", "position_ids"):
        if name in columns and not np.array_equal(columns[name].ends, tokens.ends):
            raise SourceError(f"{file}: column '{name}' and the tokens have rows of different lengths; write it again")
    return _Rows(file, columns)


def _ragged(file: Path, name: str, array: pa.Array) -> _Ragged:
    kind = array.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise SourceError(f"{file}: column '{name}' is {kind}, expected lists of integers")
    if not pa.types.is_integer(kind.value_type):
        raise SourceError(f"{file}: column '{name}' holds {kind.value_type}, expected integers")
    try:
        array.validate()
    except pa.ArrowException as error:
        raise SourceError(f"{file}: column '{name}' is damaged ({error}); write the file again") from None
    values = array.flatten()
    if array.null_count or values.null_count:
        raise SourceError(f"{file}: column '{name}' has empty (null) entries; fill or drop these rows")
    if pa.types.is_fixed_size_list(kind):
        ends = np.arange(1, len(array) + 1, dtype=np.int64) * kind.list_size
    else:
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        if np.any(np.diff(offsets) < 0) or offsets[-1] - offsets[0] != len(values):
            raise SourceError(f"{file}: column '{name}' has row offsets that do not ascend; write the file again")
        ends = offsets[1:] - offsets[0]
    return _Ragged(values.to_numpy(zero_copy_only=True), ends)


def _detect_layout(path: Path, batches: list[_Rows], options: SourceOptions) -> _Layout:
    names = set(batches[0].columns)
    for batch in batches:
        if set(batch.columns) != names:
            raise SourceError(
                f"{batch.file}: columns {sorted(batch.columns)} differ from the first file's {sorted(names)}"
            )
    tokens = "input_ids" if "input_ids" in names else "inputs"
    row_lengths = [batch.columns[tokens].lengths for batch in batches]
    lengths = {int(n) for rows in row_lengths for n in (rows.min(), rows.max())}
    n_rows = sum(len(batch.columns[tokens].ends) for batch in batches)
    uniform = lengths.pop() if len(lengths) == 1 and n_rows > 1 else 0
    packed = bool(uniform or names & {"position_ids", "sequence_lengths"})
    shifted = "labels" in names and _labels_are_shifted(path, batches, tokens)
    if "labels" not in names and tokens == "inputs":
        raise SourceError(f"{path}: column 'inputs' without 'labels'; rename it to 'input_ids' if it holds documents")
    # rows of S+1 tokens are S inputs and a label, else a row would be cut into S and 1
    label_only = uniform if "labels" not in names and uniform % 8 == 1 and uniform > 8 else 0
    return _Layout(tokens, packed, shifted, label_only, options.eos_id)


def _labels_are_shifted(path: Path, batches: list[_Rows], tokens: str) -> bool:
    """Compare labels with the tokens of their own and of the next position over the first rows."""
    same = following = compared = seen = 0
    for batch in batches:
        for r in range(len(batch.columns[tokens].ends)):
            if seen == _PROBE_ROWS:
                break
            seen += 1
            ids, labels = batch.columns[tokens].row(r)[:], batch.columns["labels"].row(r)
            if len(ids) < 2:
                continue
            inner = labels[:-1] != IGNORED
            # positions where the next token equals this one tell nothing
            inner &= ids[:-1] != ids[1:]
            compared += int(inner.sum())
            same += int((labels[:-1] == ids[:-1])[inner].sum())
            following += int((labels[:-1] == ids[1:])[inner].sum())
    if compared and same == compared:
        return False
    if compared and following == compared:
        return True
    raise SourceError(
        f"{path}: cannot tell whether 'labels' are shifted: of {compared} usable positions in the first rows "
        f"{same} equal their own token and {following} the next one; drop the column, or write all labels alike"
    )


def _part(batch: _Rows, layout: _Layout) -> Part:
    ids = batch.columns[layout.tokens]
    inner = _inner_ends(batch, layout) if layout.packed else np.empty(0, np.int64)
    if layout.shifted:
        # the label behind a row's last token is given, so a row's end is no document end by itself
        return Part(ids.values, doc_ends=inner, labels=batch.columns["labels"].values, unit_ends=ids.ends)
    if layout.label_only:
        width = layout.label_only
        rows = ids.values.reshape(-1, width)
        return Part(
            rows[:, :-1], doc_ends=inner - inner // width, labels=rows[:, 1:], unit_ends=ids.ends - ids.ends // width
        )
    mask = batch.columns["labels"].values != IGNORED if "labels" in batch.columns else None
    ends = np.union1d(inner, ids.ends) if layout.packed else ids.ends
    return Part(ids.values, doc_ends=ends, loss_mask=mask, unit_ends=ids.ends if layout.packed else None)


def _inner_ends(batch: _Rows, layout: _Layout) -> np.ndarray:
    """int64: document ends inside packed rows, without the ends of the rows."""
    ids = batch.columns[layout.tokens]
    if "position_ids" in batch.columns:
        positions = batch.columns["position_ids"].values
        inner = np.setdiff1d(np.flatnonzero(positions[1:] != positions[:-1] + 1) + 1, ids.ends)
        if np.any(positions[inner] != 0):
            raise SourceError(
                f"{batch.file}: 'position_ids' jump to another value than 0 inside a row; drop the column"
            )
    elif "sequence_lengths" in batch.columns:
        lengths = batch.columns["sequence_lengths"]
        inner = np.cumsum(lengths.values, dtype=np.int64)
        sums = np.diff(inner[lengths.ends - 1], prepend=0) if inner.size and lengths.lengths.min() > 0 else None
        if sums is None or not np.array_equal(sums, ids.lengths) or np.any(lengths.values <= 0):
            raise SourceError(f"{batch.file}: 'sequence_lengths' of a row do not sum to its length; drop the column")
    elif layout.eos_id is not None:
        inner = np.flatnonzero(ids.values == layout.eos_id) + 1
    else:
        return np.empty(0, np.int64)
    return np.setdiff1d(inner, ids.ends).astype(np.int64)
