"""Files on disk: what is written, and that nothing but exactly that is ever loaded."""

import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType

from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed, CheckpointMismatch
from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megastage.checkpoint.storage import ManifestReader, ManifestWriter


def example() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {
        "model.embed": torch.randn(37, 5, generator=g),
        "model.half": torch.randn(13, generator=g).to(torch.bfloat16),
        "model.strided": torch.randn(6, 8, generator=g).t()[::2],
        "model.flags": torch.tensor([True, False, True]),
        "model.empty": torch.empty(0, 4),
        "model.scalar": torch.tensor(2.5, dtype=torch.float64),
        "optimizer.exp_avg.embed": torch.randn(37, 5, generator=g),
        "fp8": torch.arange(9).to(torch.float8_e4m3fn),
    }


def like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(raw(a[k]) == raw(b[k]) for k in a)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CheckpointManager, Path, dict[str, torch.Tensor]]:
    manager = CheckpointManager(tmp_path / "ck")
    tensors = example()
    manager.save(4, tensors, {"step": 4, "stage_name": "général"})
    return manager, tmp_path / "ck" / "step-4", tensors


def test_every_dtype_and_shape_comes_back_bit_for_bit(saved) -> None:
    manager, _, tensors = saved
    out = like(tensors)
    assert manager.load(4, out) == {"step": 4, "stage_name": "général"}
    assert same(out, tensors)


def test_any_safetensors_reader_opens_the_shard(saved) -> None:
    _, folder, tensors = saved
    with safe_open(folder / "rank-00000.safetensors", "pt") as f:
        assert set(f.keys()) == set(tensors)
        for key, value in tensors.items():
            if key != "fp8":
                assert torch.equal(f.get_tensor(key), value), key


def test_several_files_per_rank_hold_each_tensor_once(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, files_per_rank=3)
    tensors = example()
    manager.save(0, tensors, {})
    names = sorted(p.name for p in (tmp_path / "step-0").glob("*.safetensors"))
    assert names == ["rank-00000-1.safetensors", "rank-00000-2.safetensors", "rank-00000.safetensors"]
    out = like(tensors)
    manager.load(0, out)
    assert same(out, tensors)


def test_works_under_dcp_save_and_load_themselves(tmp_path: Path) -> None:
    tensors = {k: v for k, v in example().items() if k != "model.empty"}
    flat = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    dcp.save(tensors, storage_writer=ManifestWriter(tmp_path / "x"), planner=DefaultSavePlanner(**flat), no_dist=True)
    out = like(tensors)
    dcp.load(out, storage_reader=ManifestReader(tmp_path / "x"), planner=DefaultLoadPlanner(**flat), no_dist=True)
    assert same(out, tensors)


def test_600_single_bit_flips_are_all_found_with_file_and_tensor(saved) -> None:
    manager, folder, tensors = saved
    files = sorted(p for p in folder.iterdir())
    manifest = read_manifest(folder)
    sizes = [p.stat().st_size for p in files]
    rng = random.Random(1)
    data_flips = 0
    for trial in range(600):
        # one in three in the largest file by chance of size, the others evenly over files, so small ones get theirs
        path = rng.choices(files, sizes)[0] if trial % 3 == 0 else files[trial % len(files)]
        original = path.read_bytes()
        position, bit = rng.randrange(len(original)), rng.randrange(8)
        broken = bytearray(original)
        broken[position] ^= 1 << bit
        path.write_bytes(broken)
        with pytest.raises(BadCheckpoint) as caught:
            manager.load(4, like(tensors))
        assert caught.value.file == str(path)
        assert path.name in str(caught.value)
        if path.suffix == ".safetensors" and position >= manifest.files[0].header_bytes:
            hit = [k for k, t in manifest.tensors.items() for c in t.chunks
                   if c.begin <= position < c.begin + t.chunk_bytes(c)]  # fmt: skip
            assert [caught.value.tensor] == hit
            assert hit[0] in str(caught.value)
            data_flips += 1
        path.write_bytes(original)
    assert data_flips > 50
    manager.load(4, like(tensors))


def test_verify_finds_flips_too_and_loads_nothing(saved) -> None:
    manager, folder, _ = saved
    manager.verify(4)
    path = folder / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"rank-00000.safetensors: tensor model.flags .*CRC32"):
        manager.verify(4)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "train_state.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "longer", "zeroed"])
def test_missing_cut_and_grown_files_are_bad(saved, name: str, harm: str) -> None:
    manager, folder, tensors = saved
    path = folder / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        size = len(data)
        harmed = {"empty": b"", "cut": data[: size // 2], "longer": data + b"\0", "zeroed": bytes(size)}
        path.write_bytes(harmed[harm])
    with pytest.raises(BadCheckpoint) as caught:
        manager.load(4, like(tensors))
    assert caught.value.file == str(path)
    if name.startswith("rank") and harm in ("missing", "empty", "cut"):
        with_bytes = [key for key, value in tensors.items() if value.numel()]
        assert caught.value.tensor in with_bytes
        assert str(caught.value.tensor) in str(caught.value)
        assert (f"lost is {len(with_bytes)} tensors, the first" in str(caught.value)) == (harm != "cut")


def test_mismatches_name_the_tensor_and_both_values(saved) -> None:
    manager, _, tensors = saved
    out = like(tensors)
    del out["model.flags"]
    out["model.extra"] = torch.zeros(2)
    out["model.embed"] = torch.zeros(37, 6)
    with pytest.raises(CheckpointMismatch) as caught:
        manager.load(4, out)
    assert caught.value.problems == [
        "model.embed: shape (37, 5) in the checkpoint, (37, 6) in the run",
        "model.extra: missing in the checkpoint (the run has torch.float32 (2,))",
    ]
    out = like(tensors)
    del out["model.flags"]
    with pytest.raises(CheckpointMismatch, match=r"model.flags: unknown to the run .*torch.bool \(3,\)"):
        manager.load(4, out)
    out = like(tensors)
    out["model.half"] = out["model.half"].float()
    with pytest.raises(CheckpointMismatch, match=r"dtype torch.bfloat16 in the checkpoint, torch.float32 in the run"):
        manager.load(4, out)


def test_a_mismatch_loads_nothing_and_is_not_a_bad_checkpoint(saved) -> None:
    manager, folder, tensors = saved
    out = like(tensors)
    out["model.embed"] = torch.zeros(5, 37)
    with pytest.raises(CheckpointMismatch):
        manager.load_newest(out)
    assert folder.exists()
    assert all(not v.any() for k, v in out.items() if k != "fp8")


def test_only_and_exclude_select_keys(saved) -> None:
    manager, _, tensors = saved
    model = {k: v for k, v in tensors.items() if k.startswith("model.")}
    out = like(model)
    manager.load(4, out, only=["model"])
    assert same(out, model)
    out = like(tensors)
    manager.load(4, out, exclude=["optimizer", "fp8", "dataloader"])
    assert same({k: out[k] for k in model}, model)
    assert not out["optimizer.exp_avg.embed"].any()
    with pytest.raises(ValueError, match=r"exclude_from_loading = \['optimiser'\].*optimizer"):
        manager.load(4, out, exclude=["optimiser"])


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../b", "rank-00000.safetensors\0", "sub/rank-00000.safetensors"]
)
def test_paths_that_leave_the_folder_are_refused(saved, name: str) -> None:
    manager, folder, tensors = saved
    shutil.copy(folder / "rank-00000.safetensors", folder.parent / "secret.safetensors")
    text = json.loads((folder / MANIFEST).read_text())
    manifest = read_manifest(folder)
    manifest.files[0] = type(manifest.files[0])(name, *text["files"][0][1:])
    (folder / MANIFEST).write_bytes(manifest.dump())
    with pytest.raises(BadCheckpoint, match="is not one of a checkpoint"):
        manager.load(4, like(tensors))


def test_symbolic_links_are_refused(saved) -> None:
    manager, folder, tensors = saved
    path = folder / "rank-00000.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BadCheckpoint, match="symbolic link"):
        manager.load(4, like(tensors))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["tensors"]["model.embed"].update(shape=[38, 5]), "chunks hold 185 elements"),
        (lambda d: d["tensors"]["model.embed"].update(dtype="F64"), "lie outside|belong to"),
        (lambda d: d["tensors"]["model.embed"]["chunks"][0].__setitem__(1, 10**12), "lie outside"),
        (lambda d: d["tensors"]["model.embed"]["chunks"][0].__setitem__(1, 0), "lie outside"),
        (lambda d: d["tensors"]["model.embed"]["chunks"][0].__setitem__(0, 9), "file number 9"),
        (lambda d: d["tensors"]["model.embed"]["chunks"][0].__setitem__(2, [-1, 0]), "leaves shape"),
        (lambda d: d["tensors"].pop("model.embed"), "bytes belong to a tensor or header"),
        (lambda d: d["tensors"]["model.embed"].update(dtype="O"), "'O'"),
        (lambda d: d.update(version=2), "version|reads|knows"),
        (lambda d: d.update(contents="code"), "contents 'code'"),
        (lambda d: d.pop("files"), "files"),
    ],
)
def test_a_forged_manifest_with_a_right_digest_is_still_checked(saved, change, reason: str) -> None:
    manager, folder, tensors = saved
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    del data["sha256"]
    from megastage.checkpoint.manifest import _seal

    body = json.dumps(data)[:-1].encode()
    (folder / MANIFEST).write_bytes(body + _seal(body))
    with pytest.raises(BadCheckpoint, match=reason):
        manager.load(4, like(tensors))


def test_manifest_survives_a_round_trip() -> None:
    manifest = Manifest(3, "full", [], {}, {"torch": "x"})
    body = json.loads(manifest.dump())
    assert body["step"] == 3
    assert body["files"] == []


def test_writer_and_reader_refuse_byte_items(tmp_path: Path) -> None:
    writer = ManifestWriter(tmp_path)
    plan = SavePlan([WriteItem(MetadataIndex("evil"), WriteItemType.BYTE_IO)])
    with pytest.raises(ValueError, match="evil is not a tensor"):
        writer.prepare_local_plan(plan)
    with pytest.raises(ValueError, match="evil is not a tensor"):
        writer.write_data(plan, DefaultSavePlanner())
    reader = ManifestReader(tmp_path, manifest=Manifest(0, "full", [], {}))
    index, size = MetadataIndex("evil"), torch.Size([0])
    load = LoadPlan([ReadItem(LoadItemType.BYTE_IO, index, size, index, size, size)])
    for method in (reader.prepare_local_plan, lambda p: reader.read_data(p, DefaultLoadPlanner())):
        with pytest.raises(ValueError, match="evil is not a tensor"):
            method(load)


@pytest.mark.parametrize("value", [{"lr": 1.0}, 3, b"x", io.BytesIO(), None, torch.nn.Linear(1, 1)])
def test_only_tensors_are_saved(tmp_path: Path, value: object) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointFailed, match=r"optimizer.lr is a .*only tensors are saved"):
        manager.save(1, {"optimizer.lr": value}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == []


@pytest.mark.parametrize(("state", "reason"), [({"loss": float("nan")}, "JSON"), ({"a": {1: 2}}, "a: key 1 is not")])
def test_a_train_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, reason: str) -> None:
    with pytest.raises(CheckpointFailed, match=reason):
        CheckpointManager(tmp_path).save(1, {}, state)


def test_a_planted_pickle_is_never_opened(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP's own reader would run this on load; ours has no path to it, and no import either."""
    manager, folder, tensors = saved
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    opened: list[str] = []
    import builtins

    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: (opened.append(str(file)), real(file, *a, **k))[1])
    manager.load(4, like(tensors))
    assert not any(name.endswith(".metadata") for name in opened)
    sources = Path(manifest_module()).parent.glob("*.py")
    for source in sources:
        code = re.sub(r'""".*?"""', "", source.read_text(), flags=re.S)
        assert not re.search(r"\bpickle\b|torch\.load|torch\.save|_object\b|_object_list|\beval\(", code), source


def manifest_module() -> str:
    import megastage.checkpoint.manifest as module

    assert module.__file__
    return module.__file__
