"""The faster engine is used where it agrees with the reference, and only there."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megastage.data.tokenizer import TokenizerError, load_tokenizer
from megastage.data.tokenizer_fast import FastTokenizer, choose_engine
from megastage.preprocess.__main__ import main

TEXTS = ["the cat sat", "Zürich 東京 😀", "f(x):\n  x**2\r\n", "<|endoftext|> in text", ""] * 3


def fake(wrong_for=None):
    """A stand-in for the package: the reference's own tokens, but for one text."""

    def from_json(content):
        import tokenizers

        library = tokenizers.Tokenizer.from_str(content)

        def encode_batch(texts, parallel):
            rows = [library.encode(text, add_special_tokens=False).ids + [1] * (text == wrong_for) for text in texts]
            offsets, content = np.cumsum([0, *map(len, rows)]), np.array([t for row in rows for t in row], np.uint32)
            layout = SimpleNamespace(offsets=SimpleNamespace(data=offsets), content=SimpleNamespace(data=content))
            return SimpleNamespace(layout=layout)

        return SimpleNamespace(encode_batch=encode_batch)

    return SimpleNamespace(Tokenizer=SimpleNamespace(from_json=from_json))


def equal(fast, reference, texts):
    return all(np.array_equal(a, b) for a, b in zip(fast.encode_batch(texts), reference.encode_batch(texts)))


def test_the_real_package_gives_the_tokens_of_the_reference(bpe):
    pytest.importorskip("gigatoken")
    reference = load_tokenizer(bpe)
    fast, why = choose_engine("auto", reference, TEXTS)
    assert fast is not reference, why
    assert equal(fast, reference, TEXTS)
    assert equal(fast, reference, ["one"])
    assert (fast.vocab_size, fast.eos_id, fast.sha256) == (reference.vocab_size, reference.eos_id, reference.sha256)


def test_another_token_in_the_sample_keeps_the_reference(bpe, monkeypatch):
    reference = load_tokenizer(bpe)
    monkeypatch.setitem(sys.modules, "gigatoken", fake("the cat sat"))
    chosen, why = choose_engine("auto", reference, TEXTS)
    assert chosen is reference
    assert "other tokens" in why
    with pytest.raises(TokenizerError, match="other tokens"):
        choose_engine("gigatoken", reference, TEXTS)


def test_another_token_during_the_run_is_an_error_that_says_what_to_do(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", fake("late"))
    fast, _ = choose_engine("auto", load_tokenizer(bpe), TEXTS)
    assert isinstance(fast, FastTokenizer)
    with pytest.raises(TokenizerError, match="--engine hf"):
        fast.encode_batch(["late", "other"])


def test_a_run_that_finds_another_token_is_done_again_with_the_reference(bpe, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken", fake("late"))
    monkeypatch.setattr("megastage.preprocess.pipeline.SAMPLE_CHARACTERS", 10)
    monkeypatch.setattr("megastage.data.tokenizer_fast.SAMPLE_CHARACTERS", 10)
    for name, text in (("a", "early enough to be looked at"), ("b", "late")):
        (tmp_path / f"{name}.txt").write_text(text)
    arguments = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--tokenizer", str(bpe), "--workers", "1"]
    monkeypatch.setattr("megastage.preprocess.inputs.MIN_PIECE_BYTES", 2)
    assert main([*arguments, "--output", str(tmp_path / "hf"), "--engine", "hf"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path / "auto")]) == 0
    out = capsys.readouterr().out
    assert "engine:              tokenizers (toy: gigatoken gives other tokens" in out
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "auto" / file.name).read_bytes()
    assert main([*arguments, "--output", str(tmp_path / "fast"), "--engine", "gigatoken"]) == 1
    assert "run again with --engine hf" in capsys.readouterr().err


def test_without_the_package_the_reference_is_taken(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    reference = load_tokenizer(bpe)
    assert choose_engine("auto", reference, TEXTS)[0] is reference
    with pytest.raises(TokenizerError, match="not installed"):
        choose_engine("gigatoken", reference, TEXTS)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_gives_the_same_data_set(bpe, tmp_path, workers):
    pytest.importorskip("gigatoken")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("\n".join(TEXTS * (i + 5)))
    for engine in ("hf", "gigatoken"):
        arguments = [*(str(tmp_path / f"{i}.txt") for i in range(3)), "--tokenizer", str(bpe), "--engine", engine]
        assert main([*arguments, "--output", str(tmp_path / engine), "--workers", str(workers)]) == 0
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "gigatoken" / file.name).read_bytes()
