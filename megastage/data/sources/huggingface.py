"""Text. Little of it is tokenized at the start and kept as a packed_memmap folder in a cache; much, as it is read.

The cache key is the text's content and the tokenizer; a folder appears there whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megastage.data.packed_memmap import PackedMemmapWriter, TokenizerFacts, open_packed_memmap, token_dtype
from megastage.data.sources import sample_text
from megastage.data.sources.base import Part, SourceError, SourceOptions, TokenSource
from megastage.data.sources.cache import entry
from megastage.data.sources.encoding import ByteTokenizer, batches, encode
from megastage.data.sources.live import LiveText
from megastage.data.sources.text import content_key, documents, text_files

_HUB_NAMES = {"c4": ("allenai/c4", "en")}


def open_folder(path: Path | str, options: SourceOptions) -> TokenSource:
    """Open `c4_test`, `c4_validation`, a local text file or folder, or the name of a data set on the hub."""
    tokenizer = options.tokenizer
    if tokenizer is None:
        if str(path) not in sample_text.SPLITS:
            raise SourceError(
                f"{path}: text needs a tokenizer; set model.hf_assets_path to a folder with tokenizer.json"
            )
        tokenizer = ByteTokenizer()
    found = _find(str(path), options)
    size = sum(file.stat().st_size for file in found.files)
    if options.live_bytes is not None and size > options.live_bytes:
        return LiveText(str(path), found.files, tokenizer, options)
    digest = hashlib.blake2b(found.key(), digest_size=16)
    digest.update(f"{tokenizer.sha256} {tokenizer.eos_id} {options.text_field}".encode())

    def build(folder: Path) -> None:
        _build(folder, found.documents(), tokenizer, str(path))

    data = open_packed_memmap(entry(f"text-{digest.hexdigest()}", options, build, "writes it"))
    return TokenSource(
        [Part(data.tokens, doc_ends=data.doc_ends)],
        path=path,
        dataset_type="huggingface",
        kind="documents",
        eos_id=data.metadata.eos_id,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.sha256,
        recorded_hash=data.metadata.pages_crc32.to_bytes(4, "little"),
    )


class _Text(NamedTuple):
    """Text that was found: what identifies it, its documents, and the local files that hold it, where it is in files.

    Nothing is read before it is asked for.
    """

    key: Callable[[], bytes]
    documents: Callable[[], Iterable[str]]
    files: list[Path]


def _find(path: str, options: SourceOptions) -> _Text:
    if path in sample_text.SPLITS:
        # the whole text is small; hashing it catches an edited grammar
        def key() -> bytes:
            return hashlib.blake2b("\n".join(sample_text.documents(path)).encode()).digest()

        return _Text(key, lambda: sample_text.documents(path), [])
    if Path(path).exists():
        files = text_files(Path(path))
        return _Text(lambda: content_key(files), lambda: documents(files, options.text_field), files)
    if path.startswith((".", "/", "~")):
        raise SourceError(f"{path}: no such file or folder")
    return _from_hub(path, options)


def _from_hub(name: str, options: SourceOptions) -> _Text:
    """A data set of the hub, which `datasets` keeps in Arrow files of its own cache."""
    try:
        import datasets
    except ImportError:
        raise SourceError(
            f"dataset {name!r}: no such local path, and names on the hub need `pip install megastage[datasets]`"
        ) from None
    try:
        rows: Any = datasets.load_dataset(*_HUB_NAMES.get(name, (name,)), split="train")
    except Exception as error:  # the hub client raises many kinds, network errors among them
        raise SourceError(
            f"dataset {name!r}: no such local path, and the hub gave none ({error}); "
            "give a local dataset_path, or start where the hub can be reached"
        ) from error
    if options.text_field not in rows.column_names:
        raise SourceError(f"dataset {name!r}: no column {options.text_field!r} (found {rows.column_names})")
    files = [Path(file["filename"]) for file in rows.cache_files] if getattr(rows, "_indices", None) is None else []
    return _Text(lambda: str(rows._fingerprint).encode(), lambda: (row[options.text_field] for row in rows), files)


def _build(folder: Path, contents: Iterable[str], tokenizer: Any, path: str) -> None:
    facts = TokenizerFacts(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size)
    with PackedMemmapWriter(
        folder, token_dtype(tokenizer.vocab_size), eos_id=tokenizer.eos_id, tokenizer=facts
    ) as writer:
        for texts in batches(contents):
            writer.extend(*encode(texts, tokenizer))
        if not writer.n_tokens:
            raise SourceError(f"{path}: its text gives no tokens")
