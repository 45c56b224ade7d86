"""The experiment graph: what is planned, what counts as done, and that each line means what the plan says."""
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from house import ROOT

from robustint.checks import parse_fraction
from robustint.core import make_record, read_record, sha256, write_record
from robustint.jobs import Job, describe_job, find_error, is_done, list_copies, papermill_line, remaining
from robustint.reproduce import TARGETS, places, plan, read_params
from robustint.objectives import METHODS
from robustint.tables import DATASETS, MODELS

EVERYTHING = [(target, scale) for target in TARGETS for scale in TARGETS[target].scales]


@pytest.fixture
def empty_project(tmp_path, monkeypatch):
    "A project folder with nothing in it; the notebooks are those of the checkout."
    monkeypatch.setenv("ROBUSTINT_HOME", str(tmp_path))
    return tmp_path


def all_jobs(target, scale):
    jobs, report = plan(target, scale=scale, weights=["released", "trained"])
    return [*jobs, report]


# --- what is planned ---------------------------------------------------------------------------------------------------

def test_table1_plans_every_printed_cell_and_no_other():
    with (ROOT / "data/papers/icml2020_table1.csv").open() as file:
        printed = {(row["dataset"], row["model"], row["method"], round(parse_fraction(row["epsilon"]), 6)) for row in csv.DictReader(file)}
    jobs = [job for job in plan("icml2020_table1")[0] if not job.parameters["random_start"]]
    planned = [(DATASETS[p["dataset"]], MODELS[p["architecture"]], METHODS[p["method"]].title, round(parse_fraction(eps), 6))
               for p in (job.parameters for job in jobs) for eps in p["eps"]]
    assert len(planned) == len(set(planned)) and set(planned) == printed


def test_table1_is_evaluated_as_the_protocol_says():
    for job in plan("icml2020_table1")[0]:
        settings = job.parameters
        assert (settings["steps"], settings["step_size"], settings["images"]) == (200, 0.01, 200), job.name
        assert settings["random_start"] == job.name.endswith("-start"), job.name


def test_the_attack_from_a_random_start_is_the_same_attack():
    jobs = {job.name: job.parameters for job in plan("icml2020_table1", datasets=["mnist"])[0]}
    starts = [name for name in jobs if name.endswith("-start")]
    assert len(starts) == 10
    for name in starts:
        assert jobs[name] == jobs[name.removesuffix("-start")] | {"random_start": True, "record_id": name}


@pytest.mark.parametrize("dataset, expected", [
    ("mnist", (0.3, 40, 0.01, [2000, 10000], [[0, 1e-4]], 50, 100)),
    ("cifar10", ("8/255", 10, "2/255", [5000, 70000], [[0, 1e-3], [40000, 1e-4], [60000, 1e-5]], 128, 200)),
    ("restricted_imagenet", (0.003, 7, 0.1, [5000, 10000], [[0, 1e-3], [8000, 1e-4], [16000, 1e-5]], 64, 35))])
def test_the_paper_schedule_is_the_papers(dataset, expected):
    settings = read_params("icml2020")["training"][dataset]["paper"]
    names = ("eps", "inner_steps", "inner_step_size", "eps_ramp", "learning_rate", "batch_size", "epochs")
    assert tuple(settings[name] for name in names) == expected
    assert settings["gamma"] == 0.01 and settings["normalisation"] == "code" and settings["train_images"] is None


def test_the_short_schedule_trains_four_methods_with_three_seeds():
    jobs, _ = plan("icml2020_table1", scale="short", weights=["trained"])
    trained = {job.name: job.parameters for job in jobs if job.notebook == "run_train"}
    assert set(trained) == {f"mnist-small-{m}-eps0.3-{label}s{s}" for m in ("normal", "adv", "int", "int2") for label in ("", "decay-") for s in (0, 1, 2)} | {"mnist-small-int-eps0.3-gamma_paper-s0"}
    literal, code = trained["mnist-small-int-eps0.3-gamma_paper-s0"], trained["mnist-small-int-eps0.3-s0"]
    assert {name for name in code if code[name] != literal[name]} == {"normalisation", "label", "record_id"}
    steps = code["epochs"] * (55000 // code["batch_size"])
    assert (steps, code["eps_ramp"], code["inner_steps"]) == (5500, [steps // 10, steps // 2], 40)


def test_an_attack_on_a_trained_network_waits_for_its_training():
    for target, scale in EVERYTHING:
        jobs, report = plan(target, scale=scale, weights=["released", "trained"])
        made = {}
        for job in jobs:
            assert set(job.inputs) <= set(made), "a job stands before the one that makes its input"
            if job.inputs:
                assert made[job.inputs[0]] == job.parameters["start_from" if job.notebook == "run_train" else "train_id"]
            made |= {file: job.name for file in job.outputs}
        assert report.outputs == () and report.log.endswith(f"{report.name}.ipynb")


def test_every_training_has_its_attack():
    jobs, _ = plan("quick")
    for job in jobs:
        if job.notebook == "run_train":
            assert sorted(other.notebook for other in jobs if other.parameters.get("train_id") == job.name) == ["run_cam", "run_pgd"]


@pytest.mark.parametrize("target, scale", EVERYTHING)
def test_a_run_waits_for_those_networks_alone_that_it_is_told_to_read(target, scale):
    for job in all_jobs(target, scale)[:-1]:
        read = [file for file in job.inputs if file.endswith(".safetensors")]
        told = {str(value) for value in job.parameters.values()}
        assert all(file.rsplit("/", 1)[-1].removesuffix(".safetensors") in told for file in read), job.name


def test_no_plan_leaves_open_what_the_notebook_works_out_and_records():
    for target, scale in EVERYTHING:  # such a run would never be known as done
        assert not [job.name for job in all_jobs(target, scale) if job.notebook == "run_atta" and job.parameters.get("inner_step_size", 1) is None]


def test_smoke_and_quick_write_nothing_that_git_keeps():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for where in places("smoke"), places("quick"), places("paper", {"steps": 20, "eps": ["8/255"]}):
        assert all(any(folder.startswith(name) for name in ignored) for folder in where.values())
    assert places("paper") == places("short")


# --- names that do not exist -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked, told", [
    (dict(target="icml2020_tabel1"), "did you mean icml2020_table1?"),
    (dict(datasets=["minst"]), "did you mean mnist?"),
    (dict(datasets=["digits"]), "Table 1 has no data set 'digits'"),
    (dict(methods=["int3"]), "did you mean int"),
    (dict(scale="papers"), "did you mean paper?"),
    (dict(weights=["release"]), "did you mean released?"),
    (dict(changes={"stepsize": 1}), "did you mean step_size?"),
    (dict(changes={"eps": 0.1}), "fits no run"),
    (dict(changes={"steps": "abc"}), "fits no run"),
    (dict(changes={"steps": "8/255"}), "fits no run"),
    (dict(changes={"steps": -5}), "steps must be a whole number"),
    (dict(changes={"steps": 2.5}), "steps must be a whole number"),
    (dict(changes={"method": "int"}), "choose by --method"),
    (dict(changes={"record_id": "x"}), "by papermill"),
    (dict(target="icml2020_appendix_g", changes={"steps": 20}), "are the same run"),
    (dict(changes={"eps": [8]}), "write '8/255'"),
    (dict(scale="short", weights=["trained"], datasets=["cifar10"]), "no run at scale short")])
def test_a_bad_name_is_refused_with_the_nearest_good_one(asked, told):
    with pytest.raises(ValueError) as error:
        plan(**{"target": "icml2020_table1", **asked})
    assert told in str(error.value) and "\n" not in str(error.value)


# --- seeds -------------------------------------------------------------------------------------------------------------

def test_a_seed_chooses_its_trainings_and_what_reads_them():
    every, _ = plan("icml2020_table1", weights=["trained"], datasets=["mnist"])
    two, _ = plan("icml2020_table1", weights=["trained"], datasets=["mnist"], seeds=[0, 2])
    assert two == [job for job in every if job.parameters["seed"] in (0, 2)] and len(two) == len(every) * 2 // 3


def test_released_networks_stay_whatever_the_seed():
    jobs, _ = plan("icml2020_table1", weights=["released", "trained"], datasets=["mnist"], seeds=[1])
    assert len([job for job in jobs if job.parameters.get("weights") == "released"]) == 20  # each from the image and from a random start
    assert {job.parameters["seed"] for job in jobs if job.parameters.get("weights") != "released"} == {1}


@pytest.mark.parametrize("target", ["interpretgan_table1", "interpretgan_table2", "icml2020_appendix_f", "quick"])
def test_what_a_seed_keeps_has_all_its_inputs(target):
    every, _ = plan(target, weights=["trained"])
    made = {file for job in every for file in job.outputs}
    kept, _ = plan(target, weights=["trained"], seeds=[0])
    assert kept == [job for job in every if job in kept]
    assert {file for job in kept for file in job.inputs} & made <= {file for job in kept for file in job.outputs}
    assert len(kept) < len(every) or target == "quick"


@pytest.mark.parametrize("asked, told", [
    (dict(weights=["trained"], seeds=[7]), "no run has seed 7: planned are 0, 1, 2"),
    (dict(weights=["trained"], seeds=[0, 7]), "no run has seed 7"),
    (dict(seeds=[0]), "ask for them with --weights trained"),
    (dict(target="icml2020_fig3", seeds=[0]), "nothing planned has a seed")])
def test_a_seed_that_nobody_plans_is_refused(asked, told):
    with pytest.raises(ValueError) as error:
        plan(**{"target": "icml2020_table1", **asked})
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_bad_name_in_a_params_file_is_refused(empty_project):
    folder = empty_project / "nbs/experiments"
    (folder / "params").mkdir(parents=True)
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        (folder / path.name).write_bytes(path.read_bytes())
    params = yaml.safe_load((ROOT / "nbs/experiments/params/quick.yaml").read_text())
    params["quick"]["training"]["epoch"] = 3
    (folder / "params/quick.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ValueError, match="run_train has no parameter 'epoch': did you mean epochs?"):
        plan("quick")


# --- the lines ---------------------------------------------------------------------------------------------------------

def read_line(line):
    "What papermill would make of a line: notebook, output, parameters."
    from papermill.cli import _resolve_type
    command, source, output, *words = shlex.split(line)
    assert command == "papermill"
    parameters = {}
    while words:
        kind, *words = words
        if kind == "-y":
            parameters |= yaml.safe_load(words.pop(0))
        else:
            name, value, *words = words
            parameters[name] = value if kind == "-r" else _resolve_type(value)
    return source, output, parameters


@pytest.mark.parametrize("target, scale", EVERYTHING)
def test_a_pasted_line_runs_with_the_planned_parameters(target, scale):
    for job in all_jobs(target, scale):
        source, output, parameters = read_line(papermill_line(job))
        assert (ROOT / source).is_file() and source.endswith(f"{job.notebook}.ipynb") and output == job.log
        assert parameters == job.parameters and all(type(parameters[name]) is type(job.parameters[name]) for name in parameters), job.name


def test_a_line_survives_words_that_shells_and_papermill_read_otherwise():
    odd = {"dataset": "0", "method": "None", "weights": "a b's $HOME", "train_id": "true", "record_id": None, "images": 5, "eps": ["0", 0, "8/255"], "seed": -1, "scale": ""}
    assert read_line(papermill_line(Job("x", "run_pgd", odd, log="x.ipynb")))[2] == odd


# --- what is done ------------------------------------------------------------------------------------------------------

def pretend(job, root, network=b"", **changes):
    "Write what a job would have written."
    metrics = {}
    for number, file in enumerate(name for name in job.outputs + job.inputs if name.endswith(".safetensors")):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(network)
        metrics[f"{number}_sha256"] = sha256(root / file)
    record = make_record(job.name, notebook=job.notebook, parameters=job.parameters | changes, seed=0, n=1, seconds=0, device="cpu", metrics=metrics)
    write_record(record, (root / job.outputs[0]).parent)


def test_done_work_is_left_out_and_changed_work_is_not(empty_project):
    jobs, _ = plan("quick", methods=["int"])
    train, attack, look = jobs
    assert remaining(jobs) == jobs
    for job in jobs:
        pretend(job, empty_project)
    assert remaining(jobs) == []
    pretend(attack, empty_project, steps=3)
    assert remaining(jobs) == [attack]


def test_what_a_change_does_not_touch_is_copied_and_not_run_again(empty_project):
    for job in plan("quick", methods=["int"])[0]:
        pretend(job, empty_project)
    jobs, report = plan("quick", methods=["int"], changes={"steps": 5})
    train, attack, look = jobs
    assert [job.name for job in jobs] == [job.name for job in plan("quick", methods=["int"])[0]]  # by these names the report finds them
    assert remaining(jobs) == [attack, look] and attack.parameters["steps"] == 5 and attack.parameters["scale"] == "changed"
    assert report.parameters["changes"] == {"steps": 5} and report.parameters["records"] == str(Path(attack.outputs[0]).parent)
    assert [new for _, new in list_copies(train)] == list(train.outputs)[::-1] and not list_copies(attack)
    for old, new in list_copies(train):
        (empty_project / new).parent.mkdir(parents=True, exist_ok=True)
        (empty_project / new).write_bytes((empty_project / old).read_bytes())
    assert is_done(train) and not list_copies(train) and remaining(jobs) == [attack, look]
    train, attack, look = jobs = plan("quick", methods=["int"], changes={"epochs": 1})[0]
    assert remaining(jobs) == jobs and "steps_5" not in train.outputs[0]  # another change, another place


def test_a_copy_does_not_stand_beside_a_network_it_does_not_speak_of(empty_project):
    for job in plan("quick", methods=["int"])[0]:
        pretend(job, empty_project)
    train, attack, look = jobs = plan("quick", methods=["int"], changes={"device": "cpu"})[0]  # touches nothing
    assert not remaining(jobs) and list_copies(attack)
    (empty_project / train.outputs[1]).parent.mkdir(parents=True)
    (empty_project / train.outputs[1]).write_bytes(b"another network")
    assert attack in remaining(jobs) and not list_copies(attack)


@pytest.mark.parametrize("one, other", [({"eps": [0.1]}, {"eps": 0.1}), ({"gamma": -1}, {"gamma": 1}), ({"steps": 1}, {"steps": "1"})])
def test_changes_that_read_alike_lie_apart(one, other):
    assert places("paper", one)["runs"] != places("paper", other)["runs"]


def test_a_run_that_is_changed_to_what_it_was_is_the_same_run():
    train, *_ = plan("quick", methods=["int"], changes={"compiled": False, "steps": 7})[0]
    assert train.origin == plan("quick", methods=["int"])[0][0]


@pytest.mark.parametrize("target", TARGETS)
def test_every_report_knows_that_its_runs_were_changed(target):
    report = plan(target, changes={"device": "cpu"})[1]
    assert report.parameters["changes"] == {"device": "cpu"} and report.parameters["figures"].startswith("data/runs/changed/")


def test_a_new_network_asks_for_new_attacks(empty_project):
    train, attack, look = jobs = plan("quick", methods=["int"])[0]
    for job in jobs:
        pretend(job, empty_project)
    pretend(train, empty_project, network=b"trained again")
    assert remaining(jobs) == [attack, look]


def test_a_training_that_begins_with_another_network_follows_it(empty_project):
    jobs = plan("icml2020_table1", scale="short", weights=["trained"], datasets=["mnist"], methods=["int2"])[0]
    first, second = (next(job for job in jobs if job.name == f"mnist-small-int2-eps0.3-{label}s1") for label in ("", "decay-"))
    assert second.parameters["start_from"] == first.name and second.inputs == first.outputs[1:] and second.parameters["epochs"] == 1
    pretend(first, empty_project)
    pretend(second, empty_project)
    assert is_done(first) and is_done(second)
    pretend(first, empty_project, network=b"trained again")
    assert is_done(first) and not is_done(second)


def test_a_record_does_not_ask_for_the_network_it_came_from(empty_project):
    train, attack, look = jobs = plan("quick", methods=["int"])[0]
    for job in jobs:
        pretend(job, empty_project)
    (empty_project / train.outputs[1]).unlink()
    assert remaining(jobs) == []
    (empty_project / attack.outputs[0]).unlink()
    assert remaining(jobs) == [train, attack]


def test_the_age_of_files_says_nothing(empty_project):
    import os
    jobs = plan("quick", methods=["int"])[0]
    for job in jobs:
        pretend(job, empty_project)
    for k, path in enumerate(sorted(empty_project.rglob("*.*"), reverse=True)):
        os.utime(path, (10**9 + 1000 * k, 10**9 + 1000 * k))
    assert remaining(jobs) == []


def test_a_damaged_record_is_made_again(empty_project):
    attack = plan("icml2020_table1", datasets=["mnist"], methods=["int"])[0][0]
    pretend(attack, empty_project)
    assert is_done(attack)
    (empty_project / attack.outputs[0]).write_text('{"id": "cut sh')
    assert not is_done(attack)


def test_committed_records_are_those_of_the_plan():
    "What is committed counts as done: nobody who clones the repository trains it again."
    kept = [(target, scale) for target, scale in EVERYTHING if scale in ("short", "paper")]
    jobs = {job.name: job for target, scale in kept for job in all_jobs(target, scale)[:-1]}.values()
    there = [job for job in jobs if (ROOT / job.outputs[0]).is_file()]
    if not there:
        pytest.skip("no records are committed yet")
    assert not [job.name for job in there if not is_done(job)]
    for job in there:
        record = read_record(ROOT / job.outputs[0])
        for cell in (cell for cell in record["metrics"].get("cells", []) if "correct" in cell):
            assert cell["accuracy"] == pytest.approx(cell["correct"] / cell.get("n", record["n"]))


# --- what Snakemake is given -------------------------------------------------------------------------------------------

def test_the_snakefile_makes_one_rule_of_each_job(tmp_path):
    jobs, _ = plan("quick", scale="smoke")
    (tmp_path / "plan.json").write_text(json.dumps([describe_job(job) for job in jobs]))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--directory", str(tmp_path), "--cores", "2", "--dry-run", "--config", "plan=plan.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for job in jobs:
        assert f"rule {job.name}:" in done.stdout and job.log in done.stdout


def test_the_error_of_an_executed_notebook_is_found(tmp_path):
    path = tmp_path / "x.ipynb"
    assert "no executed notebook" in find_error(path)
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": [{"output_type": "stream"}]}]}))
    assert "killed" in find_error(path)
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": [{"output_type": "error", "ename": "E", "evalue": "a\nb"}]}]}))
    assert find_error(path) == "E: a"
