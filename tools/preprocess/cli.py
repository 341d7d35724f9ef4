"""Command-line options."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from megastage import __version__

from .inputs import ACCEPTED

FORMATS = ("packed_memmap", "nanoset", "megatron")
_EPILOG = """\
examples:
  megastage-preprocess corpus/ --tokenizer llama3/ --output data/general
  megastage-preprocess 'web/*.jsonl.zst' --tokenizer gpt2/ --text-field content --skip-bad --output data/web
  megastage-preprocess books.txt --train-tokenizer 8192 --output data/books
  megastage-preprocess inspect data/general
"""


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the arguments; `tokenize` is meant when no command is named. Exits with 2 on wrong usage."""
    parser, names = _parser()
    arguments = list(argv)
    if arguments and arguments[0] not in (*names, "-h", "--help", "--version"):
        arguments.insert(0, "tokenize")
    options = parser.parse_args(arguments or ["--help"])
    module, _, function = options.target.partition(":")
    options.run = getattr(import_module(f".{module}", __package__), function)
    return options


def _parser() -> tuple[ArgumentParser, list[str]]:
    parser = ArgumentParser(
        prog="megastage-preprocess",
        description="Turn text into token data sets, and look after them. Without a command: tokenize.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megastage {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_tokenize(commands)
    _add_train(commands)
    _add_care(commands)
    return parser, list(commands.choices)


def _command(commands: Any, name: str, target: str, text: str) -> ArgumentParser:
    command: ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(target=target)
    return command


def _add_input(command: ArgumentParser) -> None:
    add = command.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=f"files, folders or globs: {ACCEPTED}")
    add("--text-field", default="text", metavar="NAME", help="field or column, a.b if nested (default: text)")
    add("--txt-lines", action="store_true", help="a document per line of .txt files (default: per file)")
    add("--skip-bad", action="store_true", help="report unusable lines and go on (default: an error)")
    many = "how much text to train a tokenizer on, from the front of every file (default: 256 MiB)"
    add("--train-bytes", type=_positive, default=256 << 20, metavar="N", help=many)


def _add_tokenize(commands: Any) -> None:
    command = _command(commands, "tokenize", "pipeline:run", "tokenize text into one data set (the default command)")
    _add_input(command)
    add = command.add_argument
    add("--output", required=True, metavar="FOLDER", help="the data set to write")
    add("--format", choices=("packed_memmap", "nanoset"), default="packed_memmap", help="default: packed_memmap")
    add = command.add_mutually_exclusive_group(required=True).add_argument
    add("--tokenizer", metavar="PATH", help="tokenizer.json, its folder, GPT-2 files or tokenizer.model")
    add("--train-tokenizer", type=_positive, metavar="VOCAB", help="train a byte-level BPE on the input")
    add = command.add_mutually_exclusive_group().add_argument
    add("--eos", metavar="TOKEN", help="token or id that ends a document (default: the tokenizer's)")
    add("--no-eos", action="store_true", help="append nothing to documents")
    add = command.add_argument
    add("--workers", type=_positive, default=_cpus(), metavar="N", help="processes (default: one a CPU)")
    many = "auto (default): gigatoken where it is installed and gives the same tokens on a sample, else hf"
    add("--engine", choices=("auto", "hf", "gigatoken"), default="auto", help=many)
    add("--overwrite", action="store_true", help="replace an output that exists")


def _add_train(commands: Any) -> None:
    command = _command(commands, "train-tokenizer", "train:run", "train a byte-level BPE tokenizer")
    _add_input(command)
    add = command.add_argument
    add("--vocab", type=_positive, required=True, metavar="N", help="entries, 257 or more")
    add("--output", required=True, metavar="FILE", help="the tokenizer.json to write")
    add("--overwrite", action="store_true", help="replace a file that exists")


def _add_care(commands: Any) -> None:
    known = "a packed_memmap or nanoset folder, a megatron .bin/.idx or a folder of them"
    add = _command(commands, "inspect", "describe:run", "statistics, a histogram and decoded samples").add_argument
    add("path", metavar="DATA", help=known)
    add("--tokenizer", metavar="PATH", help="to decode with (default: the copy in the folder)")
    add("--samples", type=_natural, default=3, metavar="N", help="documents to show (default: 3)")
    add("--seed", type=_natural, default=0, help="which documents (default: 0)")
    add("--histogram", metavar="PNG", help="also draw the document lengths (needs matplotlib)")
    add = _command(commands, "verify", "verify:run", "read everything and check every checksum and id").add_argument
    add("paths", nargs="+", metavar="DATA", help=known)
    add = _command(commands, "convert", "convert:convert", "rewrite a data set in another format").add_argument
    add("path", metavar="DATA", help=known)
    add("output", metavar="OUTPUT", help="folder to write, or the prefix of .bin and .idx")
    add("--to", choices=FORMATS, required=True, help="format to write")
    add("--tokenizer", metavar="PATH", help="tokenizer to record, where the source knows only its name")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add = _command(commands, "merge", "convert:merge", "join data sets of one tokenizer into one").add_argument
    add("paths", nargs="+", metavar="DATA", help=known)
    add("--output", required=True, metavar="OUTPUT", help="folder to write, or the prefix of .bin and .idx")
    add("--to", choices=FORMATS, default="packed_memmap", help="format to write (default: packed_memmap)")
    add("--overwrite", action="store_true", help="replace an output that exists")

    _add_pack(commands, known)


def _add_pack(commands: Any, known: str) -> None:
    text = "pack documents into rows for trainers that don't, or (without --output) tell what that would give"
    add = _command(commands, "pack", "pack:run", text).add_argument
    add("path", metavar="DATA", help=known)
    add("--seq-len", type=_positive, nargs="+", required=True, metavar="N", help="tokens of a row; several to compare")
    add("--output", metavar="FOLDER", help="the rows to write (default: none, only the table)")
    add("--method", choices=("best-fit", "concatenate"), help="default: best-fit; both in a table alone")
    add("--seed", type=_natural, default=1234, help="of the order by best fit: dataset_random_seed (default: 1234)")
    many = "input_ids with labels of the same positions (default), or inputs with labels of the next ones"
    add("--layout", choices=("input_ids", "inputs"), default="input_ids", help=many)
    add("--pad-id", type=int, metavar="ID", help="fill rows up with this token (default: rows end where they end)")
    add("--to", choices=("arrow", "parquet"), default="arrow", help="kind of files (default: arrow)")
    add("--overwrite", action="store_true", help="replace an output that exists")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
