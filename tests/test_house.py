"""The rules of the house. Each rule is tried on a made-up notebook that breaks it, then on the real ones."""
import configparser
import csv
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import house
import pytest
import yaml
from house import COMPONENTS, EXPERIMENTS, ROOT, Cell, Notebook

from robustint.jobs import PLACES
from robustint.reproduce import TARGETS, plan

component = pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.stem)
experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize("path", [ROOT / "nbs/index.ipynb", *COMPONENTS, *EXPERIMENTS], ids=lambda path: path.stem)
RECORDS = sorted((ROOT / "data/records").glob("*.json"))
TABLES = sorted(path for path in (ROOT / "figures").glob("*.csv") if not path.stem.endswith("_claims"))


def made_up(*sources, name="30_pgd", **more):
    "A notebook of code cells; a source that begins with `md:` is a markdown cell."
    cells = [Cell("markdown", s[3:]) if s.startswith("md:") else Cell("code", s, **more) for s in sources]
    return Notebook(Path(f"{name}.ipynb"), cells)


def keeps(*faults):
    "Fail with the faults found, one a line."
    found = [fault for some in faults for fault in some]
    if found:
        pytest.fail("\n".join(map(str, found)), pytrace=False)


# --- every notebook ----------------------------------------------------------------------------------------------------

def test_there_are_notebooks():
    assert COMPONENTS and EXPERIMENTS


@every_notebook
def test_notebook_keeps_the_common_rules(path):
    notebook = house.read(path)
    keeps(house.star_imports(notebook), house.exporting_calls(notebook), house.long_cells(notebook), house.personal_paths(notebook))
    assert path.stat().st_size <= house.LARGEST_NOTEBOOK, "the outputs are heavy: draw fewer or smaller images"


def test_the_common_rules_can_fail():
    assert house.star_imports(made_up("from torch import *"))
    assert house.exporting_calls(made_up("import nbdev\nnbdev.nbdev_export()"))
    assert house.long_cells(made_up("x = 1\n" * 41)) and not house.long_cells(made_up("#| export\n" + "x = 1\n" * 40))
    assert house.personal_paths(made_up("x", outputs=[{"output_type": "stream", "name": "stdout", "text": "saved /home/ada/x.png"}]))


def test_notebooks_are_clean(tmp_path):
    "nbdev_clean would change nothing, and it keeps papermill's tag."
    house.copy_notebooks(tmp_path)
    house.run_tool(house.BIN / "nbdev_clean", cwd=tmp_path)
    changed = [p.name for p in [*COMPONENTS, *EXPERIMENTS, ROOT / "nbs/index.ipynb"] if p.read_bytes() != (tmp_path / p.relative_to(ROOT)).read_bytes()]
    assert not changed, f"run make export: {changed}"


# --- components --------------------------------------------------------------------------------------------------------

def test_numbers_and_modules():
    notebooks = [house.read(path) for path in COMPONENTS]
    numbers = [notebook.number for notebook in notebooks]
    assert len(set(numbers)) == len(numbers), f"a number is used twice: {numbers}"
    assert {n.name: n.module for n in notebooks} == {n.name: n.name[3:] for n in notebooks}


@component
def test_component_imports_from_lower_numbers_only(path):
    numbers = {other.stem[3:]: int(other.stem[:2]) for other in COMPONENTS}
    keeps(house.upward_imports(house.read(path), numbers))


def test_the_import_rule_can_fail():
    numbers = {"core": 0, "pgd": 30, "training": 41}
    assert not house.upward_imports(made_up("from robustint.core import make_generator", "import robustint, torch"), numbers)
    for source in ("from robustint.training import train", "from robustint import training", "import robustint.training",
                   "from robustint.pgd import pgd", "from robustint.nowhere import x", "def f():\n    from robustint.training import train"):
        assert house.upward_imports(made_up(source), numbers), source


@component
def test_component_keeps_its_rules(path):
    notebook = house.read(path)
    assert notebook.cells[0].kind == "markdown" and notebook.cells[0].source.startswith("# "), "the first cell is the title"
    keeps(house.crowded_cells(notebook), house.mixed_imports(notebook), house.unexplained_definitions(notebook), house.failed_outputs(notebook))
    assert house.exported_lines(notebook) <= house.MOST_EXPORTED_LINES


def test_the_component_rules_can_fail():
    two = "#| export\ndef f(): pass\ndef g(): pass"
    assert house.crowded_cells(made_up(two)) and not house.crowded_cells(made_up(two.replace("#| export\n", "")))
    assert house.mixed_imports(made_up("#| export\nimport torch\ndef f(): pass"))
    assert house.unexplained_definitions(made_up("x = 1", "#| export\ndef f(): pass"))
    assert not house.unexplained_definitions(made_up("md:Why.", "#| export\nimport torch", "#| export\ndef f(): pass"))
    assert house.failed_outputs(made_up("1/0", outputs=[{"output_type": "error"}]))
    assert house.exported_lines(made_up("#| export\nx = 1\n\ny = 2", "z = 3")) == 2


@component
def test_every_public_definition_is_documented_in_place(path):
    keeps(house.undocumented(house.read(path)))


def test_the_documentation_rule_can_fail():
    good = '#| export\ndef f(\n    x, # (N,) the values\n    *,\n    y=1, # a factor\n):\n    "What it does."'
    assert not house.undocumented(made_up(good))
    assert house.undocumented(made_up(good.replace("# a factor", "")))
    assert house.undocumented(made_up(good.replace('"What it does."', "pass")))
    assert house.undocumented(made_up('#| export\ndef f(x, y): # both\n    "What it does."'))
    assert not house.undocumented(made_up("#| export\ndef _private(x): pass"))
    assert house.undocumented(made_up("#| export\nclass A: pass"))


# --- experiments -------------------------------------------------------------------------------------------------------

@experiment
def test_experiment_keeps_its_rules(path):
    keeps(house.experiment_faults(house.read(path)))


def test_the_experiment_rules_can_fail():
    def faults(*sources, **more):
        return house.experiment_faults(made_up(*sources, **{"tags": ["parameters"], **more}))
    assert not faults("seed = 0\neps = [0, '8/255']\ndevice = None")
    assert faults("seed = 0", tags=[])
    assert faults("seed = 0", "steps = 1")
    assert faults("a = 1\ntwice = a * 2")
    assert faults("from x import y")
    assert faults("seed = 0", outputs=[{"output_type": "stream"}])
    assert faults("%run other.ipynb")
    assert faults("#| export\nseed = 0")
    assert faults("def f():\n" + "    x = 1\n" * 5)


PARAMS = sorted((ROOT / "nbs/experiments/params").glob("*.yaml"))
BLOCKS = {"training": "run_train", "changes": "run_train", "attack": "run_pgd", "cam": "run_cam"}
OTHER_BLOCKS = {"interpretgan": {"atta": "run_atta", "changes": "run_atta", "evaluation": "run_pgd", "interpretgan": "run_interpretgan", "diagnosis": "run_diagnosis", "attributions": "run_attributions"}}


def unknown_keys(value, notebook=None, blocks=BLOCKS):
    "Keys of a params file that stand in a block of parameters, and that the block's notebook does not know."
    if isinstance(value, list):
        return [fault for item in value for fault in unknown_keys(item, notebook, blocks)]
    if not isinstance(value, dict):
        return []
    if notebook and not any(isinstance(item, dict) for item in value.values()):
        known = house.parameter_names(house.read(ROOT / f"nbs/experiments/{notebook}.ipynb"))
        return [f"{notebook} has no parameter {name}" for name in value if name not in known]
    return [fault for name, item in value.items() for fault in unknown_keys(item, blocks.get(name, notebook), blocks)]


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_the_keys_of_a_params_file_are_parameters_of_its_notebook(path):
    keeps(unknown_keys(yaml.safe_load(path.read_text(encoding="utf-8")), blocks=OTHER_BLOCKS.get(path.stem, BLOCKS)))


def test_the_params_rule_can_fail():
    assert unknown_keys({"training": {"mnist": {"paper": {"epochs": 1, "epoch": 1}}}}) == ["run_train has no parameter epoch"]
    assert unknown_keys({"trained": {"mnist": [{"changes": {"nothing": 1}}]}}) and unknown_keys({"attack": {"nothing": 1}})


@pytest.mark.parametrize("target, scale", [(name, scale) for name, target in TARGETS.items() for scale in target.scales])
def test_every_planned_job_names_parameters_its_notebook_has(target, scale):
    jobs, report = plan(target, scale=scale, weights=["released", "trained"])
    faults = [f"{job.name}: {job.notebook} has no parameter {name}" for job in [*jobs, report] for name in job.parameters
              if name not in house.parameter_names(house.read(ROOT / f"nbs/experiments/{job.notebook}.ipynb"))]
    keeps(faults)
    assert len({job.name for job in jobs}) == len(jobs), "two jobs would write the same record"


def test_runs_of_one_name_have_one_set_of_parameters():
    "Else one report would read what another one's run has written."
    seen, faults = {}, []
    for name, target in TARGETS.items():
        for job in (job for scale in target.scales for job in plan(name, scale=scale, weights=["released", "trained"])[0]):
            made = {key: value for key, value in job.parameters.items() if key not in PLACES}
            first, known = seen.setdefault(job.outputs[0], (name, made))
            faults += [f"{job.outputs[0]}: {key} is {known.get(key)!r} for {first}, {made.get(key)!r} for {name}" for key in {*known, *made} if known.get(key) != made.get(key)]
    keeps(faults)


# --- what is generated -------------------------------------------------------------------------------------------------

def test_the_package_is_what_the_notebooks_export(tmp_path):
    house.copy_notebooks(tmp_path)
    house.run_tool(house.BIN / "nbdev_export", cwd=tmp_path)
    made = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "robustint").glob("*.py")}
    here = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "robustint").glob("*.py")}
    assert sorted(here) == sorted(made), "robustint/ holds other modules than the notebooks export: run make export"
    assert not [name for name in made if made[name] != here[name]], "run make export, and never edit robustint/ by hand"


def test_the_readme_is_what_the_index_says(tmp_path):
    house.run_tool(house.BIN / "jupyter", "nbconvert", "--log-level=WARN", "--to", "markdown", ROOT / "nbs/index.ipynb",
                   "--output-dir", tmp_path, "--output", "README", cwd=tmp_path)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == (tmp_path / "README.md").read_text(encoding="utf-8"), "run make export"


def test_every_file_the_readme_links_to_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    keeps([f"{link} is not there" for link in links if not (ROOT / link).exists()])


def test_the_readme_names_every_room_and_every_target():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    keeps([f"no row for nbs/{path.name}" for path in COMPONENTS if f"](nbs/{path.name})" not in text])
    keeps([f"no command for {name}" for name in TARGETS if f"`robustint reproduce {name}" not in text])


# --- the exported package ----------------------------------------------------------------------------------------------

def blocked_import(code, blocked, cwd):
    "Run code in a fresh interpreter where some libraries cannot be imported."
    guard = f"import sys\nfor name in {sorted(blocked)!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", guard + code], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


def test_the_package_imports_no_notebook_library():
    found = {path.name: house.notebook_libraries(path.read_text(encoding="utf-8")) for path in (ROOT / "robustint").glob("*.py")}
    assert not {name: libraries for name, libraries in found.items() if libraries}
    assert house.notebook_libraries("def f():\n    from fastcore.all import L\nimport IPython.display") == ["IPython", "fastcore"]


def test_every_module_imports_where_no_notebook_library_is_installed(tmp_path):
    modules = [f"robustint.{path.stem[3:]}" for path in COMPONENTS]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    status, output = blocked_import(code, house.NOTEBOOK_LIBRARIES, tmp_path)
    assert status == 0, output
    assert blocked_import("import fastcore", house.NOTEBOOK_LIBRARIES, tmp_path)[0] != 0


def test_training_needs_torch_numpy_safetensors_and_tqdm_alone(tmp_path):
    others = {"torchvision", "sklearn", "scipy", "pandas", "matplotlib", "seaborn", "captum", "snakemake", "yaml", "accelerate"}
    needed = ("core", "checks", "models", "zoo", "interpreters", "discrepancy", "pgd", "objectives", "training", "evaluation")
    modules = [f"robustint.{path.stem[3:]}" for path in COMPONENTS if path.stem[3:] in needed]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    status, output = blocked_import(code, others | house.NOTEBOOK_LIBRARIES, tmp_path)
    assert status == 0, output


def test_the_installed_package_is_this_one_at_this_version():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    version = settings["DEFAULT"]["version"]
    assert importlib.metadata.version("robustint") == version, "run make setup"
    assert re.search(r'__version__ = "(.*)"', (ROOT / "robustint/__init__.py").read_text())[1] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


# --- what is committed -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tracked():
    files = house.tracked_files()
    if files is None:
        pytest.skip("no git repository: nothing to say about what it tracks")
    return files


def test_no_data_files_and_no_pickles_are_committed(tracked):
    keeps([f"a data file: {name}" for name in house.data_files(tracked)])
    assert house.data_files([Path("a/net.pkl"), Path("t10k-images-idx3-ubyte"), Path("x.JPEG")])
    assert not [str(path) for path in tracked if path.stat().st_size > 4_000_000]
    inside = [path.relative_to(ROOT).parts for path in tracked if path.is_relative_to(ROOT / "data")]
    assert {parts[1] for parts in inside} <= {"records", "papers", "networks", "runs"}
    assert all(parts[-1].startswith("state-") and parts[-1].endswith(".safetensors") for parts in inside if parts[1] == "runs"), "of runs only the state of a long training under way"


@pytest.mark.parametrize("path", RECORDS or [None], ids=lambda path: path.stem if path else "none")
def test_record_is_whole(path):
    if path is None:
        pytest.skip("no records are committed yet")
    def refuse(constant):
        raise ValueError(f"{constant} in {path.name}")
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    keeps(house.record_faults(record, path.stem))
    made_by = f"{record['notebook']}.py" if record["notebook"].startswith("benchmarks/") else f"nbs/experiments/{record['notebook']}.ipynb"
    assert (ROOT / made_by).is_file(), "no such notebook"


@pytest.mark.parametrize("path", TABLES or [None], ids=lambda path: path.stem if path else "none")
def test_table_has_the_columns(path):
    if path is None:
        pytest.skip("no table is committed yet")
    rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    assert rows and [name for name in rows[0] if name in house.TABLE_COLUMNS] == house.TABLE_COLUMNS  # between and after them a table has columns of its own
    assert list(rows[0])[4] == house.TABLE_AXES.get(path.stem, list(rows[0])[4])
    for row in rows:
        if row["ours"] and row["low"]:  # one image alone has no interval
            assert float(row["low"]) <= float(row["ours"]) <= float(row["high"]) and int(row["n"]) > 0, row
