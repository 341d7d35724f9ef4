"""The tokenizer that an exported model is given: transformers reads it and finds the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megastage.data.tokenizer import load_tokenizer, train_bpe
from megastage.export import tokenizer_files

TEXT = [f"The {i} numbers below {i * 7} are: {', '.join(map(str, range(i, i + 5)))}." for i in range(400)]


@pytest.mark.parametrize("given", ["file", "folder", "gpt2"])
def test_transformers_reads_the_exported_tokenizer(given: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    train_bpe(TEXT, 500, source / "tokenizer.json")
    path = source / "tokenizer.json" if given == "file" else source
    if given == "folder":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if given == "gpt2":
        model = json.loads((source / "tokenizer.json").read_text())["model"]
        (source / "tokenizer.json").unlink()
        (source / "encoder.json").write_text(json.dumps(model["vocab"]))
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (source / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    ours = load_tokenizer(path)
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, content in tokenizer_files(str(path), ours).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    theirs = AutoTokenizer.from_pretrained(folder)
    sample = TEXT[17] + " unseen: déjà vu\n\n  2+2"
    assert theirs(sample, add_special_tokens=False)["input_ids"] == ours.encode_batch([sample])[0].tolist()
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.decode(theirs(sample)["input_ids"]) == sample


def test_without_a_tokenizer_nothing_is_written() -> None:
    assert tokenizer_files(None, None) == {}
