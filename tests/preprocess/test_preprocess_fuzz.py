"""Damaged text files: both readers of text refuse them by name, or read the right texts."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megastage.data.sources import text
from megastage.preprocess.inputs import InputError, find_files, plan_pieces
from megastage.preprocess.readers import BadLine, Document, read_part

TEXTS = [f"{i} Zürich 東京 " + "word " * (i % 13) for i in range(200)]
LINES = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


def read_inputs(path: Path) -> list[str]:
    """By the command's reader."""
    found = []
    for part in (
        part for piece in plan_pieces(find_files([str(path)], text_lines=False), "text") for part in piece.parts
    ):
        for item in read_part(part, "text", lambda _: None):
            if isinstance(item, BadLine):
                raise item.error()
            found.append("".join(item.chunks) if isinstance(item, Document) else item)
    return found


def read_source(path: Path) -> list[str]:
    """By the trainer's reader."""
    return list(text.documents([path], "text"))


def write(path: Path) -> list[str]:
    """The texts in a file whose checksums guard them."""
    zstandard = pytest.importorskip("zstandard")
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=50, write_page_checksum=True)
        return TEXTS
    path.write_bytes(compress[path.suffix]("\n".join(TEXTS).encode() if ".txt" in path.name else LINES))
    return ["\n".join(TEXTS)] if ".txt" in path.name else TEXTS


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.txt.zst", "x.parquet"])
@pytest.mark.parametrize("read", [read_inputs, read_source])
def test_damage_is_named_or_changes_nothing(tmp_path: Path, name: str, read: Callable[[Path], list[str]]) -> None:
    path = tmp_path / name
    want = write(path)
    assert read(path) == want
    sound = path.read_bytes()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        where=st.floats(0, 1, exclude_max=True),
        how=st.sampled_from(["cut", "flip", "flip", "huge", "hole", "junk", "empty"]),
        value=st.integers(1, 255),
    )
    def check(where: float, how: str, value: int) -> None:
        at = int(where * len(sound))
        head, tail = sound[:at], sound[at:]
        broken = {
            "cut": head,
            "flip": head + bytes([tail[0] ^ value]) + tail[1:],
            "huge": head + b"\xff" * 7 + b"\x7f" + tail[8:],
            "hole": head + tail[value:],
            "junk": sound + bytes([value]) * 9,
            "empty": b"",
        }[how]
        path.write_bytes(broken)
        got, refused = None, ""
        try:
            got = read(path)
        except ValueError as error:
            refused = str(error)
        # a gzip header's time and name may be anything
        assert got == want or str(path) in refused

    check()


def test_a_hostile_zstd_file_is_unpacked_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB of zeros in some KB: a line of them is refused when it passes the limit."""
    zstandard = pytest.importorskip("zstandard")
    import tracemalloc

    compressor = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / "x.jsonl.zst", "wb") as file:
        for _ in range(256):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.flush())
    assert (tmp_path / "x.jsonl.zst").stat().st_size < 100_000
    monkeypatch.setattr("megastage.preprocess.readers.MAX_LINE_BYTES", 1 << 22)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"x\.jsonl\.zst: a line of 4,194,304 bytes or more"):
        read_inputs(tmp_path / "x.jsonl.zst")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_a_row_of_parquet_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"b\xff\xfed", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet:row 2: field 'text' is not UTF-8 at byte 1; .*--skip-bad"):
        read_inputs(tmp_path / "x.parquet")
