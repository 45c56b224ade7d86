"""Every notebook runs: a component from an empty folder, an experiment at the small defaults of its parameters cell."""
import hashlib
import json
from pathlib import Path

import house
import nbformat
import papermill
import pytest
from house import COMPONENTS, EXPERIMENTS, ROOT
from nbclient import NotebookClient
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from robustint.reproduce import TARGETS, plan

RUNS = [path for path in EXPERIMENTS if path.stem.startswith("run_")]
REPORTS = [path for path in EXPERIMENTS if not path.stem.startswith("run_")]
PLACES = ("records", "figures", "networks", "runs")  # parameters that name a folder
SECONDS_A_CELL = 240  # a limit against a hang; a component takes about 10 s on an idle machine


@pytest.fixture(autouse=True)
def one_quiet_thread(monkeypatch):
    "Kernels share two cores with the other tests."
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("ROBUSTINT_PROGRESS", raising=False)


def fingerprint(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("path", [ROOT / "nbs/index.ipynb", *COMPONENTS], ids=lambda path: path.stem)
def test_component_runs_from_an_empty_folder(path, tmp_path):
    "Paths come from core, never from the working directory; and a run leaves the notebook as it was."
    before = fingerprint(path)
    NotebookClient(nbformat.read(path, as_version=4), timeout=SECONDS_A_CELL, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert fingerprint(path) == before
    assert not list(tmp_path.iterdir()), "it writes into the folder it happens to run in"


def execute(path, folder, **parameters):
    "Run an experiment as a person would: a papermill line, with records and figures in a folder of the test."
    known = house.parameter_names(house.read(path))
    chosen = {**{name: str(folder / name) for name in PLACES if name in known}, **{name: value for name, value in parameters.items() if name not in PLACES or Path(str(value)).is_absolute()}}
    assert set(chosen) <= set(known), f"{path.stem} has no parameter {sorted(set(chosen) - set(known))}"
    output = folder / "executed" / path.name
    output.parent.mkdir(parents=True, exist_ok=True)
    before = fingerprint(path)
    papermill.execute_notebook(str(path), str(output), parameters=chosen, kernel_name="python3", cwd=str(folder), progress_bar=False, execution_timeout=SECONDS_A_CELL)
    assert fingerprint(path) == before, "the input is never overwritten"


def execute_here(path, folder, **parameters):
    """The cells of a run notebook in this process, one after the other, as papermill would set its parameters.

    A kernel of its own takes seconds to start. That the notebook runs in one is shown for each by its defaults."""
    known = house.parameter_names(house.read(path))
    chosen = {**parameters, **{name: str(folder / name) for name in PLACES if name in known}}
    assert set(chosen) <= set(known), f"{path.stem} has no parameter {sorted(set(chosen) - set(known))}"
    notebook, space = parameterize_notebook(load_notebook_node(str(path)), chosen), {"__name__": path.stem}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}", "exec"), space)


def records_in(folder):
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "records").glob("*.json")}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    "A folder for the smoke runs: several reports read the same ones, and each is run once."
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture
def kept_as_it_was(tmp_path, smoke):
    "What is committed stays as it was: a notebook writes into the folders it was given, and not beside them."
    def look():
        return {path: fingerprint(path) for name in ("data/records", "data/networks", "figures") for path in (ROOT / name).glob("*.*")}
    before = look()
    yield
    made = {path.name for folder in (tmp_path, smoke) for path in folder.rglob("*.*")}  # another process may write here too; what this test made, it may not
    assert not [path for path, now in look().items() if before.get(path) != now and path.name in made]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_notebook_writes_one_whole_record(path, tmp_path, kept_as_it_was):
    execute(path, tmp_path)
    (name, record), = records_in(tmp_path).items()
    assert not house.record_faults(record, name)
    assert record["notebook"] == path.stem


@pytest.mark.parametrize("target", TARGETS)
def test_report_is_made_from_the_records_of_its_runs(target, tmp_path, smoke, kept_as_it_was, data, monkeypatch):
    "The whole chain at smoke scale: trainings, attacks, report."
    jobs, report = plan(target, scale="smoke", weights=["trained"])
    for name in sorted({job.parameters["dataset"] for job in jobs}):
        data(name)
    monkeypatch.chdir(tmp_path)
    for job in jobs:
        record = smoke / "records" / f"{job.name}.json"
        if not record.is_file():
            before = set(records_in(smoke))
            execute_here(ROOT / f"nbs/experiments/{job.notebook}.ipynb", smoke, **job.parameters)
            assert set(records_in(smoke)) == before | {job.name}
        made = json.loads(record.read_text())["parameters"]
        assert all(made[name] == value for name, value in job.parameters.items() if name in made and name not in PLACES), "two different runs have one name"
    execute(ROOT / f"nbs/experiments/{report.notebook}.ipynb", smoke, **report.parameters | {"figures": str(tmp_path / "figures")})
    written = list((tmp_path / "figures").rglob("*.*"))
    assert {".csv", ".md"} <= {path.suffix for path in written} and all(path.stat().st_size for path in written)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_report_without_records_names_the_command_and_stops(path, tmp_path, kept_as_it_was):
    (tmp_path / "records").mkdir()
    with pytest.raises(PapermillExecutionError, match="robustint reproduce"):
        execute(path, tmp_path)
    assert not list(tmp_path.glob("figures/*"))


def test_every_report_belongs_to_a_target():
    assert {path.stem for path in REPORTS} == {target.report for target in TARGETS.values()}
