"""The command line: exit codes, bars, runs that fail, are stopped or are killed.

Most tests run a project of stand-ins: notebooks with the same parameters that only write their record, so that a run takes seconds."""
import contextlib
import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import house
import nbformat
import psutil
import pytest
import torch
import yaml
from house import ROOT

from robustint.cli import LONG, make_parser, main, reproduce, tell_time
from robustint.costs import Cost
from robustint.jobs import Job, describe_job
from robustint.reproduce import TARGETS, plan

BODY = '''
import json, os, time
from pathlib import Path
home = Path(os.environ["ROBUSTINT_HOME"])
with open(home / "log", "a") as log: log.write(record_id + "\\n")
word = os.environ.get("ROBUSTINT_PROGRESS")
if word: Path(word).write_text(json.dumps({"label": record_id, "done": 1, "total": 4, "postfix": {"loss": "0.25"}}))
time.sleep(float(os.environ.get("PATIENCE", "0")))
if method == os.environ.get("BROKEN"): raise ArithmeticError(f"{method} is broken")
'''
WRITE = '''
names = ("dataset", "architecture", "method", "eps", "seed", "scale", "steps", "images", "epochs")
made = {name: globals()[name] for name in names if name in globals()}
import hashlib, os
metrics = {"value": len(record_id), "threads": os.environ["OMP_NUM_THREADS"]}
if KIND == "run_train":
    file = Path(networks) / f"{record_id}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(record_id.encode())
else: file = Path(networks) / f"{train_id}.safetensors"
metrics["network_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
target = Path(records) / f"{record_id}.json"
target.parent.mkdir(parents=True, exist_ok=True)
Path(f"{target}.tmp").write_text(json.dumps({"id": record_id, "parameters": made, "metrics": metrics, "created": time.time()}))
os.replace(f"{target}.tmp", target)
'''
REPORT = '''
import os
from pathlib import Path
found = sorted(path.stem for path in Path(records).glob("*.json"))
Path(figures).mkdir(parents=True, exist_ok=True)
(Path(figures) / f"{KIND}.md").write_text("\\n".join(["a table", *found]) + "\\n")
'''


def stand_in(name):
    "A notebook with the parameters cell of the real one and a body that computes nothing."
    real = house.read(ROOT / f"nbs/experiments/{name}.ipynb")
    parameters = nbformat.v4.new_code_cell(house.parameter_cells(real)[0].source, metadata={"tags": ["parameters"]})
    bodies = [BODY, WRITE] if name.startswith("run_") else [REPORT]
    cells = [parameters, nbformat.v4.new_code_cell(f"KIND = {name!r}"), *[nbformat.v4.new_code_cell(body.strip()) for body in bodies]]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project folder of stand-ins."
    folder = tmp_path / "nbs/experiments"
    folder.mkdir(parents=True)
    for path in house.EXPERIMENTS:
        nbformat.write(stand_in(path.stem), folder / path.name)
    (folder / "params").mkdir()
    for path in (ROOT / "nbs/experiments/params").glob("*.yaml"):
        (folder / "params" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path))
    return tmp_path


WHOLE = ["reproduce", "quick", "--scale", "smoke", "-j", "2"]
SMOKE = [*WHOLE, "--method", "normal", "--method", "int"]  # six runs, without the diagnosis
INT = [*WHOLE, "--method", "int"]


def start(*words, **environment):
    "The command line in a process of its own."
    return subprocess.Popen([sys.executable, "-c", "import sys; from robustint.cli import main; sys.exit(main())", *words], text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


def run(*words, **environment):
    process = start(*words, **environment)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def records(project):
    "What was recorded, without the times."
    made = {path.stem: json.loads(path.read_text()) for path in (project / "data/runs/smoke/records").glob("*.json")}
    return {name: {key: value for key, value in record.items() if key not in ("created", "seconds")} for name, record in made.items()}


def asked(project):
    return (project / "log").read_text().split() if (project / "log").exists() else []


# --- bad parameters ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, told", [
    (["reproduce", "quik"], "did you mean quick?"),
    (["reproduce", "icml2020_table1", "--dataset", "minst"], "did you mean mnist?"),
    (["reproduce", "icml2020_table1", "--scale", "papers"], "did you mean paper?"),
    (["reproduce", "icml2020_table1", "--weights", "relesed"], "did you mean released?"),
    (["reproduce", "quick", "-p", "epoch=3"], "did you mean epochs?"),
    (["reproduce", "quick", "-p", "epochs"], "NAME=VALUE"),
    (["reproduce", "quick", "-p", "method=int3"], "choose by --method"),
    (["reproduce", "quick", "-p", "eps=8"], "8/255"),
    (["reproduce", "quick", "-p", "epochs=["], "robustint: "),
    (["reproduce", "quick", "-j", "0"], "-j must be 1 or more"),
    (["reproduce", "quick", "--per-gpu", "0"], "--per-gpu must be 1 or more"),
    (["reproduce", "quick", "--threads", "0"], "--threads must be 1 or more"),
    (["reproduce", "quick", "--profile", "profiles/none"], "profiles/laptop"),
    (["reproduce", "quick", "--seed", "7"], "no run has seed 7: planned are 0"),
    (["reproduce", "icml2020_table1", "--seed", "0"], "--weights trained"),
    (["plan", "icml2020_table1", "--weights", "trained", "--seed", "0", "--seed", "9"], "no run has seed 9: planned are 0, 1, 2"),
    (["plan", "quick", "-w", "0"], "1 or more"),
    (["plan", "quik"], "did you mean quick?"),
    (["fetch", "imagenet"], "mnist")])
def test_bad_parameters_end_with_2_before_anything_runs(words, told, project, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert told in err and not out and "Traceback" not in err
    assert not asked(project) and not (project / "data").exists()


@pytest.mark.parametrize("words", [[], ["reproduce"], ["reprodce", "quick"], ["reproduce", "quick", "-j", "two"], ["reproduce", "quick", "--seed", "one"], ["plan", "quick", "--report-only"], ["list", "--all"]])
def test_words_that_are_no_command_end_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage" in capsys.readouterr().err


# --- looking without running -------------------------------------------------------------------------------------------

def test_a_dry_run_prints_the_lines_and_runs_nothing(project, capsys):
    assert main([*SMOKE, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 7 and all(line.startswith("papermill nbs/experiments/") for line in lines) and "quick_report" in lines[-1]
    assert "0 of 6 runs are done" in err and not asked(project)


def test_list_names_every_target(project, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "quick: " in out and "icml2020_table1: " in out and "--scale smoke: 0 of 10 runs done" in out and all(f"{name}: " in out for name in TARGETS)


def test_a_changed_parameter_stays_apart(project, capsys):
    assert main([*SMOKE, "--dry-run", "-p", "epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "-p epochs 1" in out and "data/runs/changed/smoke-epochs_1-" in out and "data/runs/smoke" not in out


def test_fetch_says_in_one_line_why_it_failed(tmp_path, monkeypatch, capsys, server):
    monkeypatch.setenv("ROBUSTINT_SOURCE", server.address)
    assert main(["fetch", "released", "--root", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("robustint: ")


# --- how long it will take ---------------------------------------------------------------------------------------------

JOBS = [Job("fit", "run_train", {}, outputs=("fit.json", "fit.safetensors")), Job("hit", "run_pgd", {}, inputs=("fit.safetensors",), outputs=("hit.json",))]
WORDS = ["icml2020_table1", "--scale", "paper", "--weights", "trained", "--dataset", "mnist", "--method", "int", "--seed", "0", "--seed", "1", "-p", "epochs=3"]


def told(monkeypatch, fit, *more):
    "What is said before two runs, the first of which takes so many seconds."
    monkeypatch.setattr("robustint.cli.price", lambda jobs, records: {"fit": Cost(fit, "made up"), "hit": Cost(10., "made up")})
    return tell_time(JOBS, plan("icml2020_table1")[1], make_parser().parse_args(["reproduce", *WORDS, "-j", "2", *more]))


def test_a_short_job_says_how_long_it_takes_in_one_line(monkeypatch):
    line, = told(monkeypatch, 600.)
    assert line == "2 runs to do, about 11 min with 2 side by side"


def test_a_long_job_names_the_way_to_the_details_and_to_the_report_alone(monkeypatch):
    line, more = told(monkeypatch, LONG + 3600)
    assert "about 2.0 h" in line and "robustint plan " in more and more.endswith(" --report-only") and "\n" not in more
    assert all(" ".join(WORDS) in part for part in more.split("; ")), "both commands choose the same runs"
    make_parser().parse_args(["plan", *WORDS])
    make_parser().parse_args(["reproduce", *WORDS, "--report-only"])


def test_a_training_of_unknown_length_counts_as_long(monkeypatch):
    line, more = told(monkeypatch, None)
    assert "at least " in line and line.endswith("(a rough guess)") and "robustint plan" in more


def test_what_was_made_from_a_network_trained_anew_is_made_again_in_the_same_command(monkeypatch):
    "Fit is to be done; only when its new network is there does its old attack count as not done."
    fit, hit = JOBS
    left, run = [[fit], [hit], []], []
    monkeypatch.setattr("robustint.cli.remaining", lambda jobs: left.pop(0))
    monkeypatch.setattr("robustint.cli.run_jobs", lambda jobs, place, title: run.append(jobs) or [])
    monkeypatch.setattr("robustint.cli.run_report", lambda report: run.append("report") or [])
    monkeypatch.setattr("robustint.cli.price", lambda jobs, records: {job.name: Cost(10., "made up") for job in jobs})
    given = make_parser().parse_args(["reproduce", *WORDS[:1]])
    assert reproduce(JOBS, plan("icml2020_table1")[1], asked=given, again="") == 0 and run == [[fit], [hit], "report"]


# --- running -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, threads", [([], "1"), (["--threads", "2"], "2")])
def test_a_run_has_one_thread_or_as_many_as_asked(words, threads, project):
    code, _, err = run("reproduce", "quick", "--scale", "smoke", "-j", "1", "--method", "normal", *words, OMP_NUM_THREADS="7")
    assert code == 0 and {made["metrics"]["threads"] for made in records(project).values()} == {threads}, err


def test_a_run_ends_with_0_and_the_next_one_skips_what_is_done(project):
    code, out, err = run(*INT)
    assert code == 0, err
    assert len(records(project)) == 3 and "a table" in out and "written: " in out
    assert err.index("3 runs to do, at least ") < err.index("[1/3] done"), "how long it takes is said before the first run"
    assert "[3/3] done" in err and "\r" not in err and "\x1b" not in err, "no bars where there is no terminal"
    executed = {path.name for path in (project / "data/runs/smoke").glob("*.ipynb")}
    assert executed == {f"{name}.ipynb" for name in [*records(project), "quick_report"]}
    assert not list((project / "data/runs").glob(".marks-*")), "nothing is left of a run that went well"
    before, times = asked(project), {path: path.stat().st_mtime_ns for path in project.rglob("records/*.json")}
    (project / "nbs/experiments/run_train.ipynb").touch()  # a notebook that was edited asks for nothing
    code, out, err = run(*INT)
    assert code == 0 and "3 of 3 runs are done already" in err and "a table" in out and "to do" not in err
    assert asked(project) == before and times == {path: path.stat().st_mtime_ns for path in project.rglob("records/*.json")}


def test_a_change_copies_what_it_does_not_touch_and_runs_the_rest(project):
    assert run(*INT)[0] == 0
    before, network = asked(project), next((project / "data/runs/smoke/networks").glob("*-small-*")).read_bytes()
    code, _, err = run(*INT, "-p", "steps=1")
    assert code == 0 and "1 of 3 runs are done already" in err
    again = asked(project)[len(before):]
    assert len(again) == 2 and not any("eps0.15-s0" == name[-10:] for name in again)
    place = next((project / "data/runs/changed").glob("smoke-steps_1-*"))
    assert next((place / "networks").iterdir()).read_bytes() == network and len(list((place / "records").iterdir())) == 3
    assert (place / "figures/quick_report.md").is_file()


def test_the_report_alone_runs_nothing_and_lists_what_it_found(project, capsys):
    assert main([*INT, "--report-only", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.count("papermill") == 1 and "quick_report" in out and "0 of 3 runs are done" in err
    record = project / "data/runs/smoke/records/half-made.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    code, out, err = run(*INT, "--report-only")
    assert code == 0, err
    assert "a table\nhalf-made" in out and "0 of 3 runs are done already" in err and "to do" not in err
    assert asked(project) == [] and [path.name for path in record.parent.iterdir()] == [record.name]


def test_a_report_that_cannot_be_made_alone_says_why(project):
    broken = stand_in("quick_report")
    broken.cells[-1].source = 'raise FileNotFoundError("3 records are missing: run robustint reproduce quick --scale smoke")'
    nbformat.write(broken, project / "nbs/experiments/quick_report.ipynb")
    code, out, err = run(*INT, "--report-only")
    assert code == 1 and "run robustint reproduce quick" in err and "To go on" not in err and asked(project) == []


@pytest.mark.full
@pytest.mark.parametrize("share, in_turn", [(1, True), (2, False)])
def test_runs_take_turns_on_a_graphics_card_unless_they_are_told_to_share_it(project, monkeypatch, share, in_turn):
    monkeypatch.setattr("robustint.plans.pick_device", lambda: torch.device("cuda"))  # stand-ins use none, but each asks for one
    monkeypatch.setenv("PATIENCE", "8")
    assert main([*SMOKE, "--per-gpu", str(share)]) == 0
    made = [json.loads(path.read_text())["created"] for path in (project / "data/runs/smoke/records").glob("digits-small-*-s0.json")]
    assert len(made) == 2 and (abs(made[0] - made[1]) >= 8) == in_turn


def test_a_failure_leaves_its_notebook_and_the_rest_goes_on(project):
    code, out, err = run(*SMOKE, BROKEN="int")
    assert code == 1
    assert {name for name in records(project)} == {n for n in records(project) if "-normal-" in n} and len(records(project)) == 3
    line = next(line for line in err.splitlines() if line.startswith("failed: "))
    assert "ArithmeticError: int is broken" in line and "traceback in data/runs/smoke/digits-small-int-" in line
    notebook = project / re.search(r"traceback in (\S+)", line)[1]
    assert "ArithmeticError" in notebook.read_text() and "traceback" in notebook.read_text()
    assert "not run: 2" in err and "To go on where this stopped: robustint reproduce quick" in err and "Traceback" not in err
    assert not (project / "figures").exists(), "no report out of half the records"
    tried = asked(project)
    code, out, err = run(*SMOKE)
    assert code == 0 and len(records(project)) == 6 and "3 of 6 runs are done already" in err
    assert not [name for name in asked(project)[len(tried):] if "-normal-" in name]


def group_of(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


@pytest.mark.full
def test_a_run_that_is_stopped_says_how_to_go_on(project):
    process = start(*SMOKE, PATIENCE="60")
    wait_for(lambda: asked(project))
    family = group_of(psutil.Process(process.pid))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130 and "To go on: robustint reproduce quick --scale smoke" in err and "Traceback" not in err
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive]
    assert run(*SMOKE)[0] == 0 and len(records(project)) == 6


@pytest.mark.full
def test_a_run_that_is_killed_ends_with_the_same_records(project):
    process = start(*SMOKE, PATIENCE="1")
    wait_for(lambda: len(asked(project)) >= 3)
    family = group_of(psutil.Process(process.pid))
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    done = len(records(project))
    assert done < 6
    code, out, err = run(*SMOKE)
    assert code == 0 and f"{done} of 6 runs are done already" in err
    killed = records(project)
    for path in project.rglob("records/*.json"):
        path.unlink()
    assert run(*SMOKE)[0] == 0 and records(project) == killed


@pytest.mark.full
def test_runs_go_through_a_batch_system(project):
    "Each run is a job script that is submitted, as on a cluster; its record comes back."
    submit = project / "submit.sh"
    submit.write_text(f'echo "$1" >> {project}/submitted\n(bash "$1" > {project}/jobs.out 2>&1 &)\necho $RANDOM\n')
    (project / "profile").mkdir()
    (project / "profile/config.yaml").write_text(f'executor: cluster-generic\ncluster-generic-submit-cmd: "bash {submit}"\njobs: 2\nlatency-wait: 20\nseconds-between-status-checks: 1\n')
    code, out, err = run(*INT, "--profile", str(project / "profile"))
    assert code == 0, err
    assert len(records(project)) == 3 == len((project / "submitted").read_text().split())


@pytest.mark.full
def test_files_travel_through_a_bucket(project, tmp_path_factory):
    "Where the nodes share no disk, networks and records go through storage, here a folder elsewhere."
    pytest.importorskip("snakemake_storage_plugin_fs")
    if shutil.which("rsync") is None:
        pytest.skip("the storage plugin for folders copies with rsync, which is not installed")
    bucket, jobs = tmp_path_factory.mktemp("bucket"), plan("quick", scale="smoke", methods=["int"])[0]
    (project / "plan.json").write_text(json.dumps([describe_job(job) for job in jobs]))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--directory", str(project), "--cores", "2", "--config", f"plan={project / 'plan.json'}",
               "--default-storage-provider", "fs", "--default-storage-prefix", str(bucket), "--shared-fs-usage", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PATH": f"{house.BIN}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr[-3000:]
    there = {path.name for path in bucket.rglob("*") if path.is_file()}
    assert {Path(output).name for job in jobs for output in job.outputs} <= there


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("profiles/*/config.yaml")))
def test_a_profile_names_options_that_snakemake_has(name):
    from snakemake.cli import get_argument_parser
    known = {word.removeprefix("--") for action in get_argument_parser()._actions for word in action.option_strings}
    chosen = yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text())
    assert set(chosen) <= known | {"cluster-generic-submit-cmd"}, sorted(set(chosen) - known)


def test_a_plan_names_every_run_and_when_the_last_one_ends(project, capsys):
    assert main(["plan", "quick", "--scale", "smoke", "-w", "2", "--method", "normal", "--method", "int"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "digits-small-int-eps0.15-s0" in lines[3] and "6 runs" in lines[6] and "on 2 workers" in lines[7] and "longest chain" in lines[8]


@pytest.mark.full
def test_on_a_terminal_there_are_bars(project):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    environment = {**os.environ, "PATIENCE": "2", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", "import sys; from robustint.cli import main; sys.exit(main())", *INT], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # the other end is closed: the program ended
        while piece := os.read(ours, 4096):
            screen += piece
    os.close(ours)
    text = screen.decode(errors="replace")
    assert process.wait(60) == 0
    assert "3/3 runs" in text and "digits-small-int-eps0.15-s0" in text and "25%" in text and "loss=0.25" in text
    assert "[1/3] done" not in text, "bars instead of lines"


# --- the real notebooks ------------------------------------------------------------------------------------------------

@pytest.mark.full
def test_the_quick_job_at_smoke_scale_from_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path))
    code, out, err = run(*WHOLE)
    assert code == 0, err
    assert "| Normal |" in out and "| Conv2 |" in out and "NOT the paper's numbers" in out
    page = (tmp_path / "figures/smoke/report.html").read_text()
    code, out, err = run(*WHOLE)
    assert code == 0 and "10 of 10 runs are done already" in err
    assert page.count("data:image/png;base64") == 4 and "src=\"http" not in page and "href=" not in page


def train_line(folder):
    "The papermill line of a small training in a folder of its own."
    settings = {"epochs": 30, "records": folder / "records", "networks": folder / "networks", "runs": folder / "runs", "record_id": "killed"}
    folder.mkdir(exist_ok=True)
    return [str(house.BIN / "papermill"), "--no-progress-bar", str(ROOT / "nbs/experiments/run_train.ipynb"), str(folder / "executed.ipynb"),
            *[word for name, value in settings.items() for word in ("-p", name, str(value))]]


def train_record(folder):
    "Its record without the times, and the bytes of its network."
    made = json.loads((folder / "records/killed.json").read_text())
    made["metrics"]["log"] = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in made["metrics"]["log"]]
    return {key: value for key, value in made.items() if key not in ("created", "seconds", "code")}, (folder / "networks/killed.safetensors").read_bytes()


def steps_done(path):
    try:
        return json.loads(path.read_text())["done"]
    except (OSError, ValueError):
        return 0


@pytest.mark.full
def test_a_training_notebook_killed_again_and_again_ends_with_the_same_record(tmp_path):
    "Killed with SIGKILL, kernel and all, at random moments all over the run; test_training kills the loop itself twenty times."
    whole, broken, word = tmp_path / "whole", tmp_path / "broken", tmp_path / "progress.json"
    environment, chance = {**house.tool_environment(), "OMP_NUM_THREADS": "1"}, random.Random(0)
    subprocess.run(train_line(whole), env=environment, check=True, capture_output=True, cwd=ROOT)
    for moment in [chance.randrange(1, 60) for _ in range(4)]:  # steps since this start; the whole run has 300
        word.unlink(missing_ok=True)
        process = subprocess.Popen(train_line(broken), env={**environment, "ROBUSTINT_PROGRESS": str(word)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        wait_for(lambda: steps_done(word) >= moment or process.poll() is not None, 300)
        assert process.poll() is None, "it ended before it could be killed"
        for member in group_of(psutil.Process(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        assert not (broken / "records").exists()
    subprocess.run(train_line(broken), env=environment, check=True, capture_output=True, cwd=ROOT)
    assert train_record(broken) == train_record(whole)
