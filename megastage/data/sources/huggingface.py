"""Text, tokenized once with the model's tokenizer and kept as a packed_memmap folder in a cache.

The cache key is the text's content and the tokenizer; a folder appears there whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megastage.data.packed_memmap import PackedMemmapWriter, TokenizerFacts, open_packed_memmap, token_dtype
from megastage.data.sources import sample_text, text
from megastage.data.sources.base import Part, SourceError, SourceOptions, TokenSource
from megastage.data.sources.cache import entry

_BATCH_DOCUMENTS = 512
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
    key, documents = _documents(str(path), options)
    digest = hashlib.blake2b(key, digest_size=16)
    digest.update(f"{tokenizer.sha256} {tokenizer.eos_id} {options.text_field}".encode())

    def build(folder: Path) -> None:
        _build(folder, documents, tokenizer, str(path))

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


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 .. 255, and 256 for the end of a document: the made-up texts run without files."""

    name, vocab_size, eos_id = "bytes", 257, 256
    sha256 = hashlib.sha256(b"megastage bytes 257").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """uint16[n] per text."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]


def _documents(path: str, options: SourceOptions) -> tuple[bytes, Iterable[str]]:
    """What identifies the text, and its documents (not read before they are asked for)."""
    if path in sample_text.SPLITS:
        # the whole text is small; hashing it catches an edited grammar
        return hashlib.blake2b("\n".join(sample_text.documents(path)).encode()).digest(), sample_text.documents(path)
    if Path(path).exists():
        files = text.text_files(Path(path))
        return text.content_key(files), text.documents(files, options.text_field)
    if path.startswith((".", "/", "~")):
        raise SourceError(f"{path}: no such file or folder")
    return _from_hub(path, options)


def _from_hub(name: str, options: SourceOptions) -> tuple[bytes, Iterator[str]]:
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
    return str(rows._fingerprint).encode(), (row[options.text_field] for row in rows)


def _build(folder: Path, documents: Iterable[str], tokenizer: Any, path: str) -> None:
    facts = TokenizerFacts(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size)
    end = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id])]
    stream = iter(documents)
    with PackedMemmapWriter(
        folder, token_dtype(tokenizer.vocab_size), eos_id=tokenizer.eos_id, tokenizer=facts
    ) as writer:
        while texts := list(islice(stream, _BATCH_DOCUMENTS)):
            encoded = [np.concatenate([ids, *end]) for ids in tokenizer.encode_batch(texts)]
            writer.extend(np.concatenate(encoded), [len(ids) for ids in encoded])
        if not writer.n_tokens:
            raise SourceError(f"{path}: its text gives no tokens")
