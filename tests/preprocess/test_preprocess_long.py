"""Long text in bounded stretches, by kinds of tokenizers: the tokens are those of the library on the whole."""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megastage.data.long_text import stretches
from megastage.data.tokenizer import load_tokenizer

LIMIT = 2000
TEXT = (
    "Some words, a line; 12 numbers\nx = [1, 2]  # Zürich liegt am See\n\n    indented <s> text and 東京 so on\n" * 400
)
SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE = "\u2581"


def sentencepiece_bpe(*, words: bool) -> Tokenizer:
    """As Llama 2 has it: no pre-tokenizer, a space put in front of every text, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizer
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    # Whole lines reach the trainer without Metaspace, and entries that hold several words come out.
    tokenizer.train_from_iterator(TEXT.split("\n")[:3], trainer)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Sequence([]), normalizer
    content = tokenizer.to_str().replace(
        '"pre_tokenizer":{"type":"Sequence","pretokenizers":[]}', '"pre_tokenizer":null'
    )
    tokenizer = Tokenizer.from_str(content)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT[:2000]], trainer)
    return tokenizer


def byte_level(*, prefix: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT[:2000]], trainer)
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "sentencepiece bpe": (lambda: sentencepiece_bpe(words=True), True),
    "entries of several words": (lambda: sentencepiece_bpe(words=False), False),
    "unigram": (unigram, True),
    "byte level": (lambda: byte_level(prefix=False), True),
    "byte level with a space in front": (lambda: byte_level(prefix=True), True),
}


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [700, 10**9])
def test_the_tokens_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    monkeypatch.setattr("megastage.data.long_text.LONG_CHARACTERS", LIMIT)
    make, bounded = KINDS[kind]
    library = make()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.ends_with_words == bounded
    parts = list(stretches(pieces(TEXT, size), tokenizer))
    got = [token for ids in tokenizer.encode_batch(parts) for token in ids.tolist()]
    assert got == library.encode(TEXT, add_special_tokens=False).ids
    assert (max(map(len, parts)) <= 2 * LIMIT) == bounded


def test_text_without_a_place_to_cut_is_held_until_one_comes(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megastage.data.long_text.LONG_CHARACTERS", LIMIT)
    text = TEXT[:9000] + string.ascii_letters * 300 + TEXT
    parts = list(stretches(pieces(text, 700), load_tokenizer(bpe)))
    assert "".join(parts) == text
    lengths = [len(part) for part in parts]
    assert max(lengths) < 9 * LIMIT
    assert all(length <= LIMIT for length in lengths[-10:-1]), "bounded again behind it"
    library = Tokenizer.from_file(str(bpe))
    assert [i for part in parts for i in library.encode(part).ids] == library.encode(text).ids
