"""The `train-tokenizer` command."""

from __future__ import annotations

import os
import time
from argparse import Namespace

from megastage.data.tokenizer import train_bpe

from .inputs import find_files
from .pipeline import sample_texts


def run(options: Namespace) -> int:
    """Train a tokenizer on `options.inputs` and write it to `options.output`; returns the exit code."""
    start = time.monotonic()
    if os.path.exists(options.output) and not options.overwrite:
        raise ValueError(f"{options.output}: exists already; choose another name or --overwrite")
    files = find_files(options.inputs, text_lines=options.txt_lines)
    texts = sample_texts(files, options.text_field, options.train_bytes, skip_bad=options.skip_bad)
    tokenizer = train_bpe(texts, options.vocab, options.output)
    print(f"{options.output}: {tokenizer.vocab_size:,} entries, sha256 {tokenizer.sha256}")
    print(f"trained on {len(files):,} files in {time.monotonic() - start:,.1f} s")
    return 0
