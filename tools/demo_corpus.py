"""Real text in three domains from what is installed already: no download, no hub.

    python tools/demo_corpus.py corpus/          writes corpus/general, corpus/math and corpus/code (*.jsonl)

general: technical prose, the docstrings of the standard library and of installed packages; math: sympy's mathematical
modules and docstring examples; code: standard library and package sources. The same installation gives the same bytes.
Text of one kind is kept out of the others: docstrings longer than a few lines are cut from what goes to `code`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

# Apart from pydantic all of these come with torch, so every installation has them.
PROSE_PACKAGES = ("numpy", "torch", "networkx", "setuptools", "jinja2", "pydantic")
CODE_PACKAGES = ("torch", "networkx")
MATH_PACKAGES = ("sympy", "mpmath")
MIN_PROSE_CHARACTERS = 400
MAX_FILE_BYTES = 400_000
SHARDS = 2


def main() -> int:
    """Write the three domains; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--megabytes", type=float, default=8.0, help="at most this much text a domain (default: 8)")
    options = parser.parse_args()
    limit = int(options.megabytes * 1e6)
    for name, documents in (("general", general()), ("math", math()), ("code", code())):
        count, size = write(options.output / name, documents, limit)
        if not count:
            print(f"error: {name}: no text was found in this installation", file=sys.stderr)
            return 1
        print(f"{options.output / name}: {count:,} documents, {size / 1e6:.1f} MB")
    return 0


def write(folder: Path, documents: Iterable[str], limit_bytes: int) -> tuple[int, int]:
    """Deal documents to SHARDS jsonl files until `limit_bytes` of text are written: (documents, bytes).

    The folder appears when all of them are complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    count = size = 0
    seen: set[str] = set()
    temporary = [folder.with_name(f".{folder.name}-{shard:02d}.tmp") for shard in range(SHARDS)]
    files = [open(path, "w", encoding="utf-8", newline="\n") for path in temporary]  # noqa: SIM115
    for text in documents:
        text = text.strip()
        if not text or text in seen:
            continue
        seen.add(text)
        files[count % SHARDS].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        count += 1
        size += len(text.encode())
        if size >= limit_bytes:
            break
    for file in files:
        file.close()
    folder.mkdir(exist_ok=True)
    for shard, path in enumerate(temporary):
        os.replace(path, folder / f"{shard:02d}.jsonl")
    return count, size


def general() -> Iterator[str]:
    """One document a module: its longer docstrings, in order, headed by the names they describe."""
    for source in interleave([sources(None), *(sources(package) for package in PROSE_PACKAGES)]):
        prose = docstrings(source)
        if len(prose) >= MIN_PROSE_CHARACTERS:
            yield prose


def math() -> Iterator[str]:
    """sympy's and mpmath's modules as they are: formulas, derivations and worked examples in code and prose."""
    yield from interleave([sources(package) for package in MATH_PACKAGES])


def code() -> Iterator[str]:
    """Sources without their long docstrings, which are `general`'s, and without the licence comment on top."""
    for source in interleave([sources(None), *(sources(package) for package in CODE_PACKAGES)]):
        lines = without_docstrings(source).split("\n")
        start = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
        yield "\n".join(lines[start:])


def sources(package: str | None) -> Iterator[str]:
    """Python sources of an installed package, None for the standard library, in sorted order."""
    if package is None:
        root = sysconfig.get_paths()["stdlib"]
    else:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return
        root = next(iter(spec.submodule_search_locations))
    for base, folders, files in os.walk(root):
        skipped = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo", "tests", "test"}
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in sorted(files):
            path = Path(base, name)
            if name.endswith(".py") and path.stat().st_size <= MAX_FILE_BYTES:
                try:
                    yield path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue


def interleave(streams: list[Iterator[str]]) -> Iterator[str]:
    """One item of each stream in turn, so that a size limit cuts all of them alike."""
    while streams:
        alive = []
        for stream in streams:
            item = next(stream, None)
            if item is not None:
                yield item
                alive.append(stream)
        streams = alive


def documented(source: str) -> list[tuple[str, ast.Constant]]:
    """(qualified name, docstring node) of a module, its classes and functions, in source order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[tuple[str, ast.Constant]] = []
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        body = getattr(node, "body", [])
        first = body[0].value if body and isinstance(body[0], ast.Expr) else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            found.append((name, first))
        inner = [child for child in body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        stack += [(f"{name}.{child.name}".lstrip("."), child) for child in reversed(inner)]
    return found


def docstrings(source: str) -> str:
    """The docstrings of three lines and more, each under the name it describes."""
    parts = []
    for name, node in documented(source):
        text = clean(str(node.value))
        if text.count("\n") >= 2:
            parts.append(f"{name}\n\n{text}" if name else text)
    return "\n\n\n".join(parts)


def clean(text: str) -> str:
    """A docstring without its common indentation (as inspect.cleandoc does it)."""
    lines = text.expandtabs().split("\n")
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    return "\n".join([lines[0].strip(), *(line[margin:].rstrip() for line in lines[1:])]).strip()


def without_docstrings(source: str) -> str:
    """The source with docstrings of more than four lines replaced by their first line."""
    lines = source.split("\n")
    for _, node in sorted(documented(source), key=lambda item: -item[1].lineno):
        end = node.end_lineno or node.lineno
        if end - node.lineno >= 4:
            indent = lines[node.lineno - 1][: node.col_offset]
            first = clean(str(node.value)).split("\n")[0].replace("\\", "\\\\").replace('"', '\\"')
            lines[node.lineno - 1 : end] = [f'{indent}"""{first}"""']
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
