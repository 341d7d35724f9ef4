"""Tuning tables are data: looked up, written and forced without touching what a kernel computes."""

import json

import pytest
import torch
import tune_kernels

from megastage.kernels.launch import settings
from megastage.kernels.rms_norm import rms_norm
from megastage.kernels.tuning import table

BF16 = torch.bfloat16


def entry(dim, rows, **changes):
    return {"arch": "sm_90", "triton": "3.7", "dtype": "bf16", "dim": dim, "config": {"rows": rows}, **changes}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables, and fresh caches before and after."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    for cached in (table.entries, table.lookup):
        cached.cache_clear()
    yield tmp_path
    for cached in (table.entries, table.lookup):
        cached.cache_clear()


def test_lookup_prefers_the_version_then_the_nearest_size_below(folder):
    written = [entry(128, 1), entry(4096, 2), entry(4096, 3, triton="3.9"), entry(2048, 4, arch="sm_80")]
    written.append(entry(64, 5, dtype="fp32"))
    (folder / "op.json").write_text(json.dumps(written))
    lookup = lambda dim, arch="sm_90", minor="3.7", dtype=BF16: table.lookup("op", arch, minor, dtype, dim)
    assert lookup(128) == {"rows": 1}
    assert lookup(4095) == {"rows": 1}
    assert lookup(8192) == {"rows": 2}
    assert lookup(8192, minor="3.9") == {"rows": 3}
    assert lookup(8192, minor="3.6") in ({"rows": 2}, {"rows": 3})
    assert lookup(64) == {}
    assert lookup(128, arch="sm_100") == {}
    assert lookup(128, dtype=torch.float32) == {"rows": 5}
    assert settings("op", "sm_90", BF16, 128, {"rows": 9, "num_warps": 4}) == {"rows": 1, "num_warps": 4}
    assert table.dims("op", "sm_90", 128, 77) == [64, 77, 128, 4096]


@pytest.mark.parametrize("change", [{"config": {"rows": "4"}}, {"extra": 1}])
def test_a_malformed_entry_names_the_file(folder, change):
    (folder / "op.json").write_text(json.dumps([{**entry(128, 1), **change}]))
    with pytest.raises(ValueError, match=r"op\.json"):
        table.entries("op")


def test_shipped_tables_are_well_formed():
    for path in table.FOLDER.glob("*.json"):
        assert json.loads(path.read_text())


def test_settings_do_not_change_results(guard):
    x, weight = torch.randn(7, 40), torch.randn(40)
    expected = rms_norm(x, weight, backend="torch")
    for rows, warps in ((1, 1), (4, 2), (16, 8)):
        with table.forced("rms_norm", {"rows": rows, "num_warps": warps}):
            torch.testing.assert_close(rms_norm(x, weight, backend="triton"), expected)
    assert not table.FORCED


def tuned(times, wrong=None):
    """Tune a fake op whose time depends on the forced rows; `wrong` rows give another result."""
    rows = lambda: table.FORCED.get("fake", {"rows": 0})["rows"]

    def work():
        if rows() == 8:
            raise RuntimeError("out of resources")
        return torch.tensor([99.0 if wrong is not None and rows() == wrong else 1.0])

    subject = tune_kernels.Subject("fake", 1, work, {"rows": (1, 2, 4, 8)})
    return tune_kernels.tune(subject, lambda work: times[rows()])


def test_the_fastest_right_candidate_wins():
    times = {0: 10.0, 1: 9.0, 2: 5.0, 4: 7.0, 8: 1.0}
    assert tuned(times) == ({"rows": 2}, 10.0, 5.0)
    assert tuned(times, wrong=2)[0] == {"rows": 4}
    assert tuned({0: 10.0, 1: 9.9, 2: 9.8, 4: 11.0, 8: 1.0})[0] is None


def test_merge_replaces_only_its_own(folder):
    tune_kernels.merge(folder, "op", [entry(128, 1), entry(256, 2)])
    tune_kernels.merge(folder, "op", [entry(64, 3, arch="sm_80")])
    tune_kernels.merge(folder, "op", [entry(128, 7)])
    found = [(e["arch"], e["dim"], e["config"]["rows"]) for e in table.entries("op")]
    assert found == [("sm_80", 64, 3), ("sm_90", 128, 7)]


SUBJECTS = ("rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward", "cross_entropy_statistics",
    "cross_entropy_gradient", "adamw", "global_norm", "attention_forward", "attention_dq", "attention_dkv")  # fmt: skip


def test_every_kernel_is_tuned_by_a_call_that_runs(monkeypatch, capsys):
    monkeypatch.setattr(tune_kernels, "tune", lambda subject, timer: (subject.work(), (None, 1.0, 1.0))[1])
    assert tune_kernels.main(["--dry-run", "--dtype", "fp32"]) == 0
    printed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert printed == set(SUBJECTS)


def test_dry_run(tmp_path, capsys):
    arguments = ["--dry-run", "--op", "rope", "--dtype", "fp32", "--write", "--folder", str(tmp_path)]
    assert tune_kernels.main(arguments) == 0
    assert "rope 16: default" in capsys.readouterr().out


def test_what_was_found_before_a_crash_is_written(tmp_path, monkeypatch):
    def tune(subject, timer):
        if subject.op == "swiglu":
            raise RuntimeError("the GPU is gone")
        return {"rows": 4}, 2.0, 1.0

    monkeypatch.setattr(tune_kernels, "tune", tune)
    with pytest.raises(RuntimeError, match="gone"):
        tune_kernels.main(["--dry-run", "--dtype", "fp32", "--write", "--folder", str(tmp_path)])
    assert [e["dim"] for e in json.loads((tmp_path / "rms_norm.json").read_text())] == [16, 24]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without CUDA")
def test_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune_kernels.main([])
    assert "--dry-run" in capsys.readouterr().err
