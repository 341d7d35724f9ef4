"""Which documents a stage reads by their length: inheritance from [training], and what goes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megastage.config.errors import show
from megastage.config.schema import Config, DataStage

KEYS = ("min_doc_len", "long_doc_len", "long_doc_share")
_DOCUMENTS = ("packed_memmap", "preprocessed")  # the types that are read document by document, in permuted order


@dataclass(frozen=True)
class DocumentChoice:
    """The keys on documents' lengths with inheritance done; long_doc_len and long_doc_share are set both or neither."""

    min_doc_len: int = 0
    long_doc_len: int = 0
    long_doc_share: float | None = None
    notes: tuple[str, ...] = ()


def choose_documents(cfg: Config, own: DataStage, kind: str, path: str, problems: list[str]) -> DocumentChoice:
    """What the stage at key `path`, of dataset_type `kind`, reads of its documents. Appends to `problems`.

    A stage made of [training] alone answers for the keys there; otherwise keys there that a stage makes no use of are
    shown in its notes.
    """
    base, alone = cfg.training, not cfg.training.data_stages
    written: dict[str, Any] = {name: getattr(own, name) for name in KEYS}
    values = {name: getattr(base, name) if value is None else value for name, value in written.items()}
    notes: list[str] = []

    def unused(name: str, why: str, way_out: str) -> None:
        mine = written[name] is not None
        if mine or alone:
            problems.append(f"{path}.{name} = {show(values[name])}: {why}; {way_out}")
        else:
            notes.append(f"training.{name} = {show(values[name])} is not used: {why}")

    if kind not in _DOCUMENTS:
        for name, value in values.items():
            if value if name != "long_doc_share" else value is not None:
                why = f'dataset_type "{kind}" is not read document by document'
                unused(name, why, f"take it out, or use {' or '.join(_DOCUMENTS)} data")
        return DocumentChoice(notes=tuple(notes))
    least, long, share = values.values()
    if share is not None and not long:
        unused("long_doc_share", "long_doc_len is 0", "set long_doc_len, the length from which on a document is long")
        share = None
    elif long and share is None:
        unused("long_doc_len", "there is no long_doc_share", "set long_doc_share, the rows that long documents make")
        long = 0
    elif long and long <= least:
        problems.append(
            f"{path}: long_doc_len = {long} and min_doc_len = {least}: no document could be short; "
            "raise long_doc_len, or lower min_doc_len"
        )
    return DocumentChoice(least, long, share, tuple(notes))
