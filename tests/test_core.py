"""Seeds, devices, paths, files that are whole or not at all, records, progress."""
import errno
import io
import json
import math
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from robustint import core
from conftest import one_line


def test_generators_repeat_and_leave_the_global_state():
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=core.make_generator(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0", None, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be") as error:
        core.make_generator(seed)
    one_line(error)


def test_device_comes_from_the_argument_then_the_environment(monkeypatch):
    monkeypatch.setenv("ROBUSTINT_DEVICE", "warp")
    assert core.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="no device is called 'warp'") as error:
        core.pick_device()
    one_line(error)
    monkeypatch.setenv("ROBUSTINT_DEVICE", "cpu")
    assert core.pick_device().type == "cpu"
    with pytest.raises(ValueError, match="not on this machine") as error:
        core.pick_device("cuda:77")
    one_line(error)


def test_each_process_has_a_card_of_its_own_and_single_precision_is_single(monkeypatch):
    monkeypatch.delenv("ROBUSTINT_DEVICE", raising=False)
    monkeypatch.setattr(core.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(core.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(core.torch.backends.cudnn, "allow_tf32", True)
    assert core.pick_device() == core.torch.device("cuda") and not core.torch.backends.cudnn.allow_tf32
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert core.pick_device() == core.pick_device("cuda") == core.torch.device("cuda:1")
    assert core.pick_device("cuda:0") == core.torch.device("cuda:0") and core.pick_device("cpu") == core.torch.device("cpu")


def test_roots_do_not_depend_on_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("ROBUSTINT_HOME", raising=False)
    monkeypatch.delenv("ROBUSTINT_DATA", raising=False)
    root = core.project_root()
    monkeypatch.chdir(tmp_path)
    assert core.project_root() == root
    assert core.data_root() == root / "data" / "raw"
    assert core.data_root("here") == tmp_path / "here"
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path / "home"))
    assert core.project_root() == tmp_path / "home" and core.data_root() == tmp_path / "home" / "data" / "raw"
    monkeypatch.setenv("ROBUSTINT_DATA", str(tmp_path / "elsewhere"))
    assert core.data_root() == tmp_path / "elsewhere"


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    path = core.write_atomic(tmp_path / "new" / "file", "old")
    assert path.read_text() == "old"
    with pytest.raises(RuntimeError):
        with core.open_atomic(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old" and temporary.parent == path.parent
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]
    assert core.write_atomic(path, b"new").read_bytes() == b"new"


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        with core.open_atomic(tmp_path / "file"):
            pass
    assert not list(tmp_path.iterdir())


def test_two_processes_may_write_the_same_file(tmp_path):
    path, fork = tmp_path / "file", multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_for, args=(path, letter, 0.5)) for letter in "ab"]
    for writer in writers: writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = path.read_text()
            assert content in ("a" * 50_000, "b" * 50_000)
            seen.add(content[0])
    assert all(writer.exitcode == 0 for writer in writers) and seen
    assert os.listdir(tmp_path) == ["file"]


def _write_for(path, letter, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end: core.write_atomic(path, letter * 50_000)


# ---- killed

def _write_records(folder, start):
    for step in range(start, 10**9): core.write_record(_record(step), folder)


def _record(step):
    return {"id": "mnist-small-int", "step": step, "filling": ["x" * 1000] * (step % 50), "metrics": {"twice": 2 * step}}


def _kill_while_writing(kill_after, folder, times, chance):
    last = 0
    for _ in range(times):
        assert kill_after(chance.uniform(0.001, 0.05), _write_records, folder, last)
        for record in core.read_records("*", folder):
            assert record == _record(record["step"])  # whole, whatever step it was
            last = max(last, record["step"])
    core.write_record(_record(last + 1), folder)
    assert os.listdir(folder) == ["mnist-small-int.json"], "orphans are swept by the next write"
    assert last > 0


def test_a_record_is_whole_after_a_kill(kill_after, tmp_path):
    _kill_while_writing(kill_after, tmp_path, 20, random.Random(0))


@pytest.mark.full
def test_a_record_is_whole_after_many_kills(kill_after, tmp_path):
    _kill_while_writing(kill_after, tmp_path, 400, random.Random(1))


# ---- full disks

def test_a_full_disk_is_named_and_the_old_file_stays(small_disk):
    path = core.write_atomic(small_disk / "file", "old")
    with pytest.raises(OSError, match="no space left writing .*file: free some space") as error:
        core.write_atomic(path, bytes(100_000))
    one_line(error)
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and os.listdir(small_disk) == ["file"]
    core.write_atomic(path, "new")


def test_a_full_disk_leaves_the_old_record(small_disk):
    record = {"id": "one", "metrics": {"accuracy": 0.5}}
    core.write_record(record, small_disk)
    with pytest.raises(OSError, match="no space left") as error:
        core.write_record({**record, "metrics": {"many": list(range(50_000))}}, small_disk)
    one_line(error)
    assert core.read_record(small_disk / "one.json") == record


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "disk quota used up"), (errno.EFBIG, "file size limit reached")])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_late(monkeypatch, tmp_path, code, words, call):
    path = core.write_atomic(tmp_path / "file", "old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(core.os, call, fail)
    with pytest.raises(OSError, match=words) as error:
        core.write_atomic(path, "new")
    one_line(error)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def _write_with_limit(path, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        core.write_atomic(path, bytes(5000))
    except OSError as error:
        queue.put(str(error))


def test_a_file_size_limit_of_the_system(tmp_path):
    path, fork = core.write_atomic(tmp_path / "file", "old"), multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=_write_with_limit, args=(path, queue))
    process.start()
    assert "file size limit reached writing" in queue.get(timeout=30)
    process.join()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_other_errors_pass_unchanged(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(OSError):
        core.write_atomic(tmp_path / "file" / "below", "x")


# ---- records

def _made(**changes):
    made = dict(notebook="run_pgd", parameters={"eps": "8/255"}, seed=0, n=200, seconds=1.0, device="cpu", metrics={"accuracy": 0.5})
    return core.make_record("mnist-small-int", **{**made, **changes})


def test_a_record_holds_what_a_reader_needs(tmp_path):
    record = _made()
    assert set(record) == {"schema", "id", "notebook", "parameters", "seed", "n", "seconds", "device", "machine", "metrics", "code", "libraries", "created"}
    path = core.write_record(record, tmp_path)
    text = path.read_text()
    assert path.name == "mnist-small-int.json" and text.endswith("}\n") and json.loads(text) == record
    assert list(json.loads(text)) == sorted(record) and text.splitlines()[1].startswith(' "')
    assert record["libraries"]["torch"] == torch.__version__


def test_numbers_of_other_libraries_become_plain(tmp_path):
    metrics = {"a": numpy.float32(0.5), "b": numpy.int64(3), "c": torch.tensor(2), "d": numpy.float64(0.1), "e": (1, 2), "f": numpy.bool_(True), "g": Path("x")}
    again = core.read_record(core.write_record(_made(metrics=metrics), tmp_path))
    assert again["metrics"] == {"a": 0.5, "b": 3, "c": 2, "d": 0.1, "e": [1, 2], "f": True, "g": "x"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, numpy.float32("nan"), torch.tensor(math.nan), torch.zeros(2), numpy.zeros(2), object(), {1, 2}])
def test_what_no_record_holds(tmp_path, value):
    with pytest.raises(ValueError, match=r"mnist-small-int.metrics.deep\[1\] is") as error:
        core.write_record(_made(metrics={"deep": [0, value]}), tmp_path)
    one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "with space", None, 3])
def test_ids_that_name_no_file(tmp_path, name):
    with pytest.raises(ValueError, match="names its file") as error:
        core.write_record({"id": name}, tmp_path)
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"{", b'{"id": "a"', b"[]", b"3", b"\xff\xfe"])
def test_damaged_records_are_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json") as error:
        core.read_records("*", tmp_path)
    one_line(error)


def test_records_are_read_by_pattern_and_in_order(tmp_path):
    for name in ("b-1", "a-2", "a-1"): core.write_record({"id": name}, tmp_path)
    assert [record["id"] for record in core.read_records("*", tmp_path)] == ["a-1", "a-2", "b-1"]
    assert [record["id"] for record in core.read_records("a-*", tmp_path)] == ["a-1", "a-2"]
    assert core.read_records("*", tmp_path / "nowhere") == []
    with pytest.raises(FileNotFoundError, match="no record") as error:
        core.read_record(tmp_path / "none.json")
    one_line(error)


def test_the_code_version_tells_a_clean_tree_from_a_dirty_one(tmp_path, monkeypatch):
    for part in ("nbs", "robustint"): (tmp_path / part).mkdir()
    (tmp_path / "settings.ini").touch()
    module = tmp_path / "robustint" / "core.py"
    module.write_text("# one\n")
    monkeypatch.setattr(core, "_checkout", lambda: tmp_path)
    assert core.code_version().endswith(" unknown")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]): subprocess.run(git + words, check=True, capture_output=True)
    clean = core.code_version()
    assert not clean.endswith("unknown") and "+" not in clean
    (tmp_path / "nbs" / "note").write_text("not the package")
    assert core.code_version() == clean
    module.write_text("# two\n")
    assert core.code_version() == clean + "+dirty"


# ---- progress

def test_progress_is_silent_off_a_terminal(capfd):
    assert list(core.track([1, 2, 3], label="steps")) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


def test_progress_is_left_for_the_caller(tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    monkeypatch.setenv("ROBUSTINT_PROGRESS", str(file))
    steps = core.track(iter(range(5)), total=5, label="attack")
    for step in steps:
        steps.set_postfix(loss=0.123456, step=step)
        list(core.track(range(3), label="inner"))
    assert json.loads(file.read_text()) == {"label": "attack", "done": 5, "total": 5, "postfix": {"loss": "0.1235", "step": "4"}}
    assert os.listdir(tmp_path) == ["progress.json"]


def test_progress_of_a_resumed_run_begins_where_it_stood(tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    monkeypatch.setenv("ROBUSTINT_PROGRESS", str(file))
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    words = [json.loads(file.read_text())["done"] for _ in core.track(range(70, 73), total=100, initial=70, label="resumed")]
    assert words[0] == 70 and json.loads(file.read_text()) == {"label": "resumed", "done": 73, "total": 100, "postfix": {}}
    assert "70/100" in terminal.getvalue() and "0/100" not in terminal.getvalue().replace("70/100", "")


def test_progress_never_fails_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_PROGRESS", str(tmp_path / "nowhere" / "progress.json"))
    assert list(core.track(range(3))) == [0, 1, 2]


def test_progress_of_a_broken_loop_starts_anew(tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    monkeypatch.setenv("ROBUSTINT_PROGRESS", str(file))
    with pytest.raises(RuntimeError):
        for _ in core.track(range(3), label="first"): raise RuntimeError
    for _ in core.track(range(2), label="second"): pass
    assert json.loads(file.read_text())["label"] == "second"


def test_importing_core_is_light():
    loaded = subprocess.run([sys.executable, "-c", "import sys, robustint.core, robustint.checks; print(*sys.modules)"], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "sklearn", "scipy", "pandas", "matplotlib", "nbdev", "fastcore", "IPython", "papermill"} & {name.split(".")[0] for name in loaded}
