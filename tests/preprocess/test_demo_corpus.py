import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_three_domains_of_real_text_the_same_each_time(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "demo_corpus.py"), "--megabytes", "0.3"]
    for name in ("a", "b"):
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True, timeout=60)
    seen: set[str] = set()
    for domain in ("general", "math", "code"):
        files = sorted((tmp_path / "a" / domain).glob("*.jsonl"))
        assert files
        texts = [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]
        assert 250_000 < sum(len(text.encode()) for text in texts) < 800_000
        assert not seen & set(texts)
        seen |= set(texts)
        for file in files:
            assert file.read_bytes() == (tmp_path / "b" / domain / file.name).read_bytes()
