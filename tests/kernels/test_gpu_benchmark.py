"""The GPU benchmark as far as it goes without one: the dry run, what cannot run, time, processes, arguments."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

import gpu  # noqa: E402
import gpu_measure  # noqa: E402
from gpu_cases import CAUSAL, DOCUMENTS, OPS, TOY, Case, Place, Sizes, block_mask, document_ends  # noqa: E402
from gpu_checks import check_makers  # noqa: E402
from gpu_plan import Budget, Item, scratch, timings  # noqa: E402

CPU = torch.device("cpu")
TOY_CPU = Place(TOY, CPU, torch.float32, "torch")


def test_dry_run(tmp_path):
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 problems" in result.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["op"] for row in found["rows"]} == set(OPS)
    assert {row["op"] for row in found["errors"]} >= set(check_makers(TOY_CPU))
    assert all(row["forward_ms"] > 0 for row in found["rows"] if row["way"].startswith("ours"))
    assert all("did_not_run" in row or row["forward_ms"] > 0 for row in found["rows"])
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


# --- what does not run


def test_a_wrong_op_is_not_timed(tmp_path):
    log = gpu.Log(tmp_path / "log")
    log.write("check", key="adamw, float32|0|", rows=[], problems=["adamw, float32 (ours): off"])
    assert "off" in gpu_measure.wrong(log, Item("adamw", 1024, "ours"))
    assert gpu_measure.wrong(log, Item("adamw", 1024, "torch fused")) == ""
    assert gpu_measure.wrong(log, Item("rope", 1024, "ours")) == ""
    case = Case("adamw", 8, (torch.ones(2),), {"ours": lambda x: (x,)})
    assert gpu_measure.measure(Item("adamw", 8, "ours"), case, CPU, "wrong: off")["did_not_run"] == "wrong: off"


def test_failures_keep_their_reason():
    class BackEndError(Exception):
        pass

    def fails(*inputs):
        raise BackEndError("no such chip\nmore")

    case = Case("op", 8, (torch.ones(2),), {"ours": fails, "plain": lambda x: (x,)})
    row = gpu_measure.measure(Item("op", 8, "ours"), case, CPU)
    assert row["did_not_run"] == "BackEndError: no such chip"
    assert "no such chip" in gpu.table([row])
    assert gpu_measure.judged(Item("op", 8), lambda: case)["problems"] == ["op, 8 tokens: BackEndError: no such chip"]

    def too_large():
        raise torch.OutOfMemoryError("too large")

    missing = gpu_measure.attempt(too_large)
    assert "too large" in gpu_measure.measure(Item("op", 8, "ours"), missing, CPU)["did_not_run"]


def test_the_plain_form_is_skipped_by_its_size_and_not_tried():
    """64 GiB of scores at 32k tokens and 32 heads in bf16; the form holds three of them at once."""
    sizes = Sizes()
    assert scratch(CAUSAL, 32768, "plain", sizes, 2) / 2**30 == pytest.approx(3 * 64, rel=0.02)
    assert scratch(CAUSAL, 8192, "plain", sizes, 2) / 2**30 < 16
    item = Item(CAUSAL, 32768, "plain", 1.0, scratch(CAUSAL, 32768, "plain", sizes, 2))
    fake = mock.Mock(mem_get_info=lambda device: (70 * 2**30, 80 * 2**30))
    with mock.patch.object(torch, "cuda", fake):
        row = gpu_measure.measure(item, Case(CAUSAL, 8, (), {}), torch.device("cuda"))
    assert "GiB" in row["did_not_run"]


# --- time


def expected(lengths, **changes):
    return timings(lengths, Sizes(), "", 2, True, **changes)


def test_the_plan_holds_all_that_was_asked_for():
    items = expected(gpu.LENGTHS)
    assert {(i.op, i.length, i.way) for i in items} == {
        (o, n, w) for o in OPS for n in gpu.LENGTHS for w in OPS[o].ways
    }
    assert {"sdpa flash", "sdpa cudnn", "flex", "plain"} < set(OPS[CAUSAL].ways)
    assert [(i.length, i.way) for i in items[:2]] == [(32768, "ours"), (32768, "sdpa flash")]
    compiled = [i.way == "flex" for i in items]
    assert compiled == sorted(compiled)
    rest = sum(i.expected_s for i in items if i.way != "flex")
    assert rest < 300  # so that what is not flex fits, and some of flex


@pytest.mark.parametrize("slower", [0.3, 1.0, 4.0])
def test_the_budget_holds_on_a_slower_gpu(slower):
    """Nothing is begun that does not fit, and the first items of each way teach how long the next ones take."""
    now = 0.0
    budget = Budget(475.0, lambda: now)
    begun, latest = [], 0.0
    for item in expected(gpu.LENGTHS):
        if budget.fits(item):
            begun.append(item)
            latest = max(latest, item.expected_s * slower)
            now += item.expected_s * slower
            budget.learn(item, item.expected_s * slower)
    assert now < 475 + latest  # at worst by one item: then the supervisor ends it
    seen = {(i.op, i.length) for i in begun if i.way == "ours"}
    assert seen >= {(op, n) for op in OPS for n in (32768, 131072, 8192)}
    if slower <= 1:
        assert {i.length for i in begun if i.way == "flex"} >= {32768, 131072}


def test_checks_come_first_and_a_second_process_goes_on_behind_them(tmp_path, capsys):
    arguments = ["--dry-run", "--ops", "swiglu", "--lengths", "8", "--out", str(tmp_path), "--worker-seconds"]
    with (
        mock.patch.object(
            gpu_measure, "timings", lambda *a: [Item("swiglu", 8, way, 1.0) for way in ("ours", "plain")]
        ),
        mock.patch.object(gpu_measure, "Item", lambda *a: Item(*a, 1.0)),
    ):  # expected to take a second each
        assert gpu.main([*arguments, "0"]) == 0
        log = gpu.Log(tmp_path / "gpu.jsonl")
        assert [e["event"] for e in log.events()] == ["facts", *["begin", "check"] * 2]
        assert gpu.main([*arguments, "100"]) == 0
    assert [e["event"] for e in log.events()[5:]] == ["begin", "time"] * 2
    assert {e["row"]["way"] for e in log.events() if e["event"] == "time"} == {"ours", "plain"}
    assert "swiglu, checked: right" in capsys.readouterr().out


def test_repetitions_shrink_with_the_length_of_a_call():
    assert gpu_measure.repetitions(1e-5) == 200
    assert gpu_measure.repetitions(0.01) == 10
    assert gpu_measure.repetitions(0.5) == 3
    assert gpu_measure.repetitions(2.0) == 1


def test_median_of_a_gpu_by_its_events():
    """With a GPU of nothing but a clock: the call that compiles is not counted, the cache is flushed before each."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 50.0

    flush = mock.Mock(zero_=lambda: happened.append("flush"))
    with (
        mock.patch.object(torch, "cuda", mock.Mock(Event=Event, _sleep=lambda cycles: happened.append("sleep"))),
        mock.patch.object(torch, "empty", lambda *a, **k: flush),
    ):
        assert gpu_measure.median_ms(lambda: happened.append("run"), torch.device("cuda")) == 50.0
    assert happened == ["run", *["flush", "sleep", "record", "run", "record", "wait"] * 3]


# --- processes


def start(script):
    """A start that runs `script` with the log's path, whatever it is asked for."""
    text = "import json, os, sys, time\nlog = open(sys.argv[1], 'a')\n"
    text += "write = lambda **e: (log.write(json.dumps(e) + '\\n'), log.flush())\n" + textwrap.dedent(script)
    return lambda command: subprocess.Popen([sys.executable, "-c", text, *[command[-1]]])


def supervised(tmp_path, script, seconds=60.0):
    log = gpu.Log(tmp_path / "log")
    run = start(script)
    begun = []
    with mock.patch.multiple(gpu, LEAST_START_S=0.2, POLL_S=0.05, MOST_STARTS=6):
        gpu.supervise([], log, seconds, lambda command: begun.append(1) or run([str(log.path)]))
    return log, len(begun)


def test_work_goes_on_behind_an_item_that_kills_its_process(tmp_path):
    script = """
        done = [json.loads(line)["key"] for line in open(sys.argv[1]) if '"time"' in line]
        for key in ("a|1|ours", "b|1|ours", "c|1|ours"):
            if key not in done:
                write(event="begin", key=key)
                if key == "b|1|ours":
                    os._exit(-11 % 256)
                write(event="time", key=key, row={"op": key[0], "length": 1, "way": "ours", "forward_ms": 1.0})
    """
    log, starts = supervised(tmp_path, script)
    assert starts == 2
    rows = gpu.collect([Item(op, 1, "ours") for op in "abcd"], log)["rows"]
    assert [row.get("did_not_run", "ran") for row in rows] == [
        "ran", "its process died (status 245)", "ran", "out of time (--minutes)",
    ]  # fmt: skip


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    log = gpu.Log(tmp_path / "log")
    log.write("time", key="a|1|ours", row={"op": "a"})
    whole = log.path.read_text()
    log.path.write_text(whole + whole[:-2])  # ends with the brace of the row
    assert log.done() == {"a|1|ours"}
    assert len(log.events()) == 1


def test_a_hung_process_is_ended_in_time(tmp_path):
    log, starts = supervised(tmp_path, "write(event='begin', key='a|5|')\ntime.sleep(100)", seconds=2.0)
    assert starts == 1
    found = gpu.collect([Item("a", 5), Item("b", 5)], log)
    assert found["problems"] == ["a, 5 tokens: it was ended: out of time (--minutes)", "b, 5 tokens: not checked"]


def test_work_goes_on_behind_an_item_that_never_ends(tmp_path):
    script = """
        if os.path.getsize(sys.argv[1]):
            write(event="check", key="b|5|", rows=[], problems=[])
            sys.exit(0)
        write(event="begin", key="a|5|")
        time.sleep(100)
    """
    with mock.patch.object(gpu, "SILENT_S", 1.0):
        log, starts = supervised(tmp_path, script)
    assert starts == 2
    assert gpu.collect([Item("a", 5), Item("b", 5)], log)["problems"] == [
        "a, 5 tokens: it was ended: no answer for 1 s"
    ]  # fmt: skip


def test_a_broken_cuda_context_is_noticed():
    broken = mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    for synchronize, lost in ((broken, True), (mock.Mock(), False)):
        with mock.patch.object(torch, "cuda", mock.Mock(synchronize=synchronize)):
            assert gpu_measure.is_lost(torch.device("cuda")) == lost


def test_a_process_that_cannot_start_is_not_tried_for_ever(tmp_path):
    assert supervised(tmp_path, "sys.exit(1)")[1] == 1
    again = "write(event='begin', key=f'{time.time()}|1|ours')\nos._exit(1)"
    (tmp_path / "again").mkdir()
    assert supervised(tmp_path / "again", again)[1] == 6


# --- pieces and arguments


@pytest.mark.parametrize(
    ("length", "ends"), [(512, (0, 512)), (512, (0, 100, 128, 300, 512)), (700, (0, 1, 383, 384, 700))]
)
def test_block_mask_is_what_pytorch_makes_of_the_same_mask(length, ends):
    from torch.nn.attention.flex_attention import create_block_mask

    ours = block_mask(length, ends, CPU)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    for kind in ("kv", "full_kv"):
        counts, lists = (getattr(theirs, f"{kind}_{what}")[0, 0] for what in ("num_blocks", "indices"))
        assert torch.equal(getattr(ours, f"{kind}_num_blocks")[0, 0], counts)
        for row, count in enumerate(counts):
            assert torch.equal(getattr(ours, f"{kind}_indices")[0, 0, row, :count], lists[row, :count])
    document = torch.bucketize(torch.arange(length), torch.tensor(ends[1:]), right=True)
    place = torch.arange(length)
    seen = (document[:, None] == document[None, :]) & (place[:, None] >= place[None, :])
    assert torch.equal(ours.mask_mod(0, 0, place[:, None], place[None, :]), seen)


def test_documents_cover_the_row():
    ends = document_ends(5000, 300)
    assert ends[0] == 0
    assert ends[-1] == 5000
    assert ends == sorted(set(ends))
    assert 10 < len(ends) < 40


def test_plan_needs_no_gpu(capsys):
    assert gpu.main(["--plan", "--ops", "attention"]) == 0
    printed = capsys.readouterr().out
    assert f"{DOCUMENTS} | 131072 | torch varlen" in printed
    assert "s are planned" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "--dry-run", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="without CUDA")),
        (["--dry-run", "--lengths", "0"], "--lengths 0"),
        (["--dry-run", "--ops", "nosuch"], "nosuch"),
        (["--dry-run", "--minutes", "0.1"], "--minutes 0.1"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bf16_is_right_on_this_gpu(tmp_path):
    assert gpu.main(["--check-only", "--out", str(tmp_path)]) == 0
