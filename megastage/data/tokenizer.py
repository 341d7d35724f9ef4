"""Text to token ids and back: tokenizer.json, GPT-2 files, SentencePiece models, or a byte-level BPE trained here."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from megastage.data.durable import write_atomically
from megastage.data.packed_memmap import TokenizerFacts

END_OF_TEXT = "<|endoftext|>"
# Asked in this order when no tokenizer_config.json names the end-of-document token.
EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[EOS]")
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
# Of one call to the library: its encodings take some 100 bytes a character, and stay in the cache this way.
_CALL_CHARACTERS = 1 << 16
_SPACES = " \u2581\u0120"  # as it is, SentencePiece's, that of byte-level vocabularies
_ACCEPTED = "a tokenizer.json, a folder holding one, GPT-2 files (encoder.json + vocab.bpe) or a tokenizer.model"


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and the way out."""


class NoTokenizer(TokenizerError):
    """There is none at the path given."""


class _Engine(Protocol):
    def encode(self, texts: list[str]) -> Iterable[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...
    def vocabulary(self) -> dict[str, int]: ...
    def canonical(self) -> bytes: ...
    def splits_words(self) -> bool: ...


class Tokenizer:
    """A tokenizer with what data sets record of it.

    `vocab_size` is one more than the largest id (added tokens included), `eos_id` the end-of-document id or None,
    `sha256` a hash over what decides the tokens: model, normalizer, pre-tokenizer and added tokens.
    """

    def __init__(self, engine: _Engine, name: str, *, eos_token: str | None = None) -> None:
        self._engine = engine
        self.name = name
        vocabulary = engine.vocabulary()
        if not vocabulary:
            raise TokenizerError(f"{name}: the vocabulary is empty; give {_ACCEPTED}")
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(engine.canonical()).hexdigest()
        named = [eos_token] if eos_token is not None else EOS_NAMES
        self.eos_id = next((vocabulary[token] for token in named if token in vocabulary), None)

    @property
    def facts(self) -> TokenizerFacts:
        """What a data set records of this tokenizer."""
        return TokenizerFacts(self.name, self.sha256, self.vocab_size)

    @cached_property
    def ends_with_words(self) -> bool:
        """Whether no token reaches from one word into the next, so that long text can be encoded in parts.

        So it is where text is cut into words before the model sees it, or no entry of the vocabulary holds a space
        behind another character: then no merge and no piece can cross one.
        """
        return self._engine.splits_words() or not any(
            space in entry.lstrip(space) for entry in self._engine.vocabulary() for space in _SPACES
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64[n]; no special tokens are added."""
        # Through `array`, in half the time that numpy takes for a list of Python's integers.
        return [np.asarray(array("q", ids)) for part in _calls(texts) for ids in self._engine.encode(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are shown, ids outside the vocabulary are left out."""
        return self._engine.decode([int(i) for i in ids])

    def token_id(self, token: str) -> int:
        """The id that a user means by `token`: a token of the vocabulary, or a number. Raises TokenizerError."""
        vocabulary = self._engine.vocabulary()
        if not token.isdecimal() and token in vocabulary:
            return vocabulary[token]
        if token.isdecimal() and int(token) < self.vocab_size:
            return int(token)
        likely = [name for name in EOS_NAMES if name in vocabulary]
        hint = f"; it has {', '.join(likely)}" if likely else ""
        raise TokenizerError(
            f"{self.name}: {token!r} is neither a token nor an id below {self.vocab_size} of this tokenizer{hint}"
        )

    def to_json(self) -> bytes | None:
        """The tokenizer as tokenizer.json, None when it has no such form (SentencePiece)."""
        if isinstance(self._engine, _FastEngine):
            return self._engine.tokenizer.to_str(pretty=False).encode("utf-8")
        return None


def _calls(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, some at a time."""
    part: list[str] = []
    characters = 0
    for text in texts:
        part.append(text)
        characters += len(text)
        if characters >= _CALL_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


class _FastEngine:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def encode(self, texts: list[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def splits_words(self) -> bool:
        return self.tokenizer.pre_tokenizer is not None

    def canonical(self) -> bytes:
        """What decides the tokens, the same however the file is laid out and whatever defaults a version adds."""
        content = json.loads(self.tokenizer.to_str())
        kept = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        merges = kept["model"].get("merges")
        if merges is not None:
            kept["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        return json.dumps(_without_defaults(kept), sort_keys=True, separators=(",", ":")).encode("ascii")


class _SentencePieceEngine:
    """A SentencePiece model, through the optional `sentencepiece` library."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise TokenizerError(
                f"{path}: SentencePiece models need the library: pip install sentencepiece, or a tokenizer.json"
            ) from None
        self._content = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self._content)
        except RuntimeError as error:
            raise TokenizerError(
                f"{path}: not a SentencePiece model ({error}); convert a tiktoken file to tokenizer.json"
            ) from None

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._model.Encode(texts)

    def decode(self, ids: list[int]) -> str:
        return self._model.Decode([i for i in ids if i < self._model.GetPieceSize()])

    def vocabulary(self) -> dict[str, int]:
        return {self._model.IdToPiece(i): i for i in range(self._model.GetPieceSize())}

    def canonical(self) -> bytes:
        return self._content

    def splits_words(self) -> bool:
        return False


def load_tokenizer(path: str | os.PathLike[str], *, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer from a file or a folder; `eos` (a token or an id) overrides the detected end of document.

    Without it the id comes from `eos_token` in a tokenizer_config.json beside the tokenizer, else from the first of
    EOS_NAMES that the vocabulary holds, else it is None. Raises TokenizerError naming the file.
    """
    path = Path(path)
    engine, folder = _load_engine(path)
    tokenizer = Tokenizer(engine, _short_name(path), eos_token=_configured_eos(folder))
    if eos is not None:
        tokenizer.eos_id = tokenizer.token_id(eos)
    return tokenizer


def _short_name(path: Path) -> str:
    """A name that does not depend on where the tokenizer lies: its folder's, or the file's if that says more."""
    generic = {"tokenizer.json", "tokenizer.model", *(name for pair in _GPT2_FILES for name in pair)}
    path = path.resolve()
    return path.parent.name if path.name in generic else path.stem if path.is_file() else path.name


def _load_engine(path: Path) -> tuple[_Engine, Path]:
    if path.is_dir():
        for name in ("tokenizer.json", *(pair[0] for pair in _GPT2_FILES), "tokenizer.model"):
            if (path / name).is_file():
                return _load_file(path / name), path
        raise NoTokenizer(f"{path}: no tokenizer in this folder; give {_ACCEPTED}")
    if not path.is_file():
        raise NoTokenizer(f"{path}: no such file or folder; give {_ACCEPTED}")
    return _load_file(path), path.parent


def _load_file(path: Path) -> _Engine:
    if path.suffix == ".model":
        return _SentencePieceEngine(path)
    for pair in _GPT2_FILES:
        if path.name in pair:
            return _FastEngine(_gpt2(path.with_name(pair[0]), path.with_name(pair[1])))
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: not a tokenizer.json ({error}); give {_ACCEPTED}") from None
    if getattr(tokenizer.model, "dropout", None):
        raise TokenizerError(f"{path}: model.dropout is {tokenizer.model.dropout} (random tokens); set it to null")
    return _FastEngine(tokenizer)


def _gpt2(vocabulary_file: Path, merges_file: Path) -> tokenizers.Tokenizer:
    for file in (vocabulary_file, merges_file):
        if not file.is_file():
            raise TokenizerError(f"{file}: missing; GPT-2's tokenizer is {vocabulary_file.name} and {merges_file.name}")
    try:
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines if _is_merge(line))]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{vocabulary_file}, {merges_file}: not GPT-2 tokenizer files ({error})") from None
    _byte_level(tokenizer)
    if END_OF_TEXT in vocabulary:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _is_merge(line: str) -> bool:
    return bool(line) and not line.startswith("#version")


def _byte_level(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def _configured_eos(folder: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json beside the tokenizer, if it names one."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        token: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{file}: not readable as JSON ({error}); repair or remove it") from None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` ids (256 bytes, merges, <|endoftext|>) and write it to `path`.

    The same texts give the same file. Raises TokenizerError when the texts are too few for that many merges.
    """
    if vocab_size < 257:
        raise TokenizerError(f"vocabulary {vocab_size}: a byte-level BPE needs at least 257: 256 bytes, {END_OF_TEXT}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    _byte_level(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise TokenizerError(
            f"vocabulary {vocab_size}: the text has too few repeated pieces, only {reached} entries came out; "
            f"give more text or ask for at most {reached}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, tokenizer.to_str(pretty=False).encode("utf-8"))
    return load_tokenizer(path)


def _without_defaults(value: Any) -> Any:
    """The value without null and false entries, which newer library versions add for older files."""
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items() if item is not None and item is not False}
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value
