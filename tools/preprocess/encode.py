"""From a piece of input to a shard of tokens: what one worker does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from megastage.data import long_text
from megastage.data.tokenizer import Tokenizer

from .inputs import Piece
from .readers import BadLine, Document, read_part
from .shards import MAX_EXAMPLES, Settings, ShardFacts, ShardWriter

BATCH_CHARACTERS = 1 << 20


def encode_piece(piece: Piece, settings: Settings, tokenizer: Tokenizer, progress: Callable[[int], None]) -> ShardFacts:
    """Tokenize a piece into its shard. Raises InputError naming the first bad line unless `skip_bad`."""
    writer = ShardWriter(settings, piece)
    try:
        encoder = _Encoder(writer, settings, tokenizer)
        for part in piece.parts:
            for item in read_part(part, settings.text_field, progress):
                if isinstance(item, BadLine):
                    if not settings.skip_bad:
                        raise item.error()
                    writer.facts.bad += 1
                    if len(writer.facts.examples) < MAX_EXAMPLES:
                        writer.facts.examples.append(f"{item.where}: {item.reason}")
                elif isinstance(item, Document):
                    encoder.add_long(item.chunks)
                elif len(item) > long_text.LONG_CHARACTERS:
                    encoder.add_long(iter((item,)))
                else:
                    encoder.add(item)
        encoder.flush()
        return writer.finish()
    except BaseException:
        writer.abort()
        raise


class _Encoder:
    """Gathers documents into batches for the tokenizer, and takes long ones a stretch at a time."""

    def __init__(self, writer: ShardWriter, settings: Settings, tokenizer: Tokenizer) -> None:
        self._writer, self._tokenizer = writer, tokenizer
        self._end = np.array([] if settings.eos_id is None else [settings.eos_id], dtype=np.int64)
        self._batch: list[str] = []
        self._characters = 0

    def add(self, text: str) -> None:
        if not text:
            self._writer.facts.empty_documents += 1
            return
        self._batch.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if not self._batch:
            return
        facts = self._writer.facts
        facts.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in self._batch)
        encoded = self._tokenizer.encode_batch(self._batch)
        self._batch, self._characters = [], 0
        # A text whose every character the tokenizer drops is as empty as "".
        kept = [ids for ids in encoded if ids.size]
        facts.empty_documents += len(encoded) - len(kept)
        if kept:
            self._writer.write(np.concatenate([part for ids in kept for part in (ids, self._end)]))
            self._writer.end_documents([ids.size + self._end.size for ids in kept])

    def add_long(self, chunks: Iterator[str]) -> None:
        self.flush()
        length = 0
        for text in long_text.stretches(self._counted(chunks), self._tokenizer):
            ids = self._tokenizer.encode_batch([text])[0]
            self._writer.write(ids)
            length += ids.size
        if not length:
            self._writer.facts.empty_documents += 1
            return
        self._writer.write(self._end)
        self._writer.end_documents([length + self._end.size])

    def _counted(self, chunks: Iterator[str]) -> Iterator[str]:
        for chunk in chunks:
            self._writer.facts.text_bytes += len(chunk) if chunk.isascii() else len(chunk.encode())
            yield chunk
