"""From a piece of input to a shard of tokens: what one worker does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from megastage.data.tokenizer import Tokenizer

from .inputs import Piece
from .readers import BadLine, Document, read_part
from .shards import MAX_EXAMPLES, Settings, ShardFacts, ShardWriter

BATCH_CHARACTERS = 1 << 20
LONG_CHARACTERS = 1 << 20
_WINDOW = 512
_SEARCH_CHARACTERS = 1 << 14
_TRIES = 32
# A space between a letter or digit and a letter; a line break between two visible characters.
_SEAMS = (re.compile(r"(?<=[^\W_]) (?=[^\W\d_])"), re.compile(r"(?<=\S)\n(?=\S)"))


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
                elif len(item) > LONG_CHARACTERS:
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
        for text in stretches(self._counted(chunks), self._tokenizer):
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


def stretches(chunks: Iterator[str], tokenizer: Tokenizer) -> Iterator[str]:
    """Cut long text where the tokens stay those of the whole, so that memory stays bounded.

    Only tokenizers whose tokens end with words are helped, and only between two words or lines where encoding the
    surroundings in two parts was seen to give the tokens of the whole. Where there is no such place the text is held
    until one comes. The space between two words is left out where the tokenizer itself puts one in front of a text.
    """
    waiting: list[str] = []
    size, reach = 0, LONG_CHARACTERS
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size <= 2 * reach or not tokenizer.ends_with_words:
            continue
        held, start = "".join(waiting), 0
        while size - start > 2 * reach:
            cut = _safe_cut(held, start + reach // 2, start + reach, tokenizer)
            if cut is None:
                reach *= 2
                continue
            yield held[start : cut[0]]
            start, reach = cut[1], LONG_CHARACTERS
        waiting, size = [held[start:]], size - start
        del held
    if size:
        yield "".join(waiting)


def _safe_cut(text: str, least: int, end: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Where one part can end and where the next begins, looked for backwards from `end`; None after some tries."""
    tries = 0
    while end > least and tries < _TRIES:
        begin = max(least, end - _SEARCH_CHARACTERS)
        for seams in _SEAMS:
            for match in reversed(list(seams.finditer(text, begin, end))[-_TRIES // 2 :]):
                cut = match.start() if match[0] == " " else match.end()
                for following in sorted({cut, match.end()}):
                    if _keeps_tokens(text, cut, following, tokenizer):
                        return cut, following
                tries += 1
        end = begin
    return None


def _keeps_tokens(text: str, cut: int, following: int, tokenizer: Tokenizer) -> bool:
    """Whether the surroundings of a cut, encoded in two parts, have the tokens of the whole."""
    begin, end = max(0, cut - _WINDOW), cut + _WINDOW
    whole, left, right = tokenizer.encode_batch([text[begin:end], text[begin:cut], text[following:end]])
    return np.array_equal(whole, np.concatenate([left, right]))
