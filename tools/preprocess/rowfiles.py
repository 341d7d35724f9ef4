"""Folders of packed rows: Arrow files as Hugging Face's `load_from_disk` reads them, or Parquet files."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megastage.data.durable import StagedFolder, fsync_path, write_atomically

KINDS = ("arrow", "parquet")
FILE_BYTES = 1 << 29  # of one file, uncompressed
_NAMES = re.compile(r"data-\d{5}\.(arrow|parquet)|state\.json|dataset_info\.json")


def is_ours(name: str) -> bool:
    """Whether a file name belongs to such a folder (other files keep it from being overwritten)."""
    return _NAMES.fullmatch(name) is not None


class RowWriter:
    """Writes list columns into a new folder that appears whole or not at all; a context manager."""

    def __init__(self, folder: str | os.PathLike[str], kind: str, note: str, *, overwrite: bool) -> None:
        """Raises ValueError when the folder exists or holds other files. kind: one of KINDS."""
        self._staged = StagedFolder(folder, overwrite=overwrite, is_ours=is_ours)
        self._kind, self._note = kind, note
        self._writer: Any = None
        self._bytes = self.n_files = 0

    def write(self, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Add R rows: per column int64[R + 1] row bounds and int32 values."""
        arrays = [pa.ListArray.from_arrays(pa.array(b, pa.int32()), pa.array(v)) for b, v in columns.values()]
        batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
        if self._writer is None:
            path = str(self._staged.path / f"data-{self.n_files:05d}.{self._kind}")
            parquet = self._kind == "parquet"
            self._writer = (
                pq.ParquetWriter(path, batch.schema, compression="zstd", write_page_checksum=True)
                if parquet
                else pa.ipc.new_stream(path, batch.schema)
            )
            self.n_files += 1
        self._writer.write_batch(batch)
        self._bytes += batch.nbytes
        if self._bytes >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        complete = False
        try:
            self._close()
            if kind is None:
                self._finish()
                complete = True
        finally:
            if not complete:
                self._staged.discard()

    def _finish(self) -> None:
        names = sorted(path.name for path in self._staged.path.iterdir())
        for name in names:
            fsync_path(self._staged.path / name)
        if self._kind == "arrow":
            state: dict[str, Any] = {
                "_data_files": [{"filename": name} for name in names],
                "_fingerprint": "",
                "_split": None,
            }
            state |= dict.fromkeys(("_format_columns", "_format_type")) | {"_format_kwargs": {}}
            state["_output_all_columns"] = False
            self._write("state.json", state)
            self._write("dataset_info.json", {"description": self._note})
        self._staged.commit()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self._staged.path / name, (json.dumps(content, indent=2) + "\n").encode("ascii", "replace"))
