import json
from pathlib import Path

import numpy as np
import pytest

from megastage.preprocess.__main__ import main

_WORDS = ["the", "cat", "sat", "Zürich", "東京", "😀", "counted", "1234", "sheep;", "f(x):\n", "", "", "x**2\r\n"]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of a byte-level BPE of 300 entries, trained here, in a folder called toy."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(_WORDS, rng.integers(1, 60))) for _ in range(300)]
    source = folder / "train.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    path = folder / "toy" / "tokenizer.json"
    assert main(["train-tokenizer", str(source), "--vocab", "300", "--output", str(path)]) == 0
    return path
