"""The notebooks as the tests read them, and the rules of the house: each rule is a function that returns its violations."""
import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COMPONENTS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
EXPERIMENTS = sorted((ROOT / "nbs/experiments").glob("[a-z]*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LONGEST_CELL, LONGEST_EXPERIMENT_FUNCTION, MOST_EXPORTED_LINES, LARGEST_NOTEBOOK = 40, 5, 320, 1_000_000


@dataclass
class Cell:
    kind: str  # "code" or "markdown"
    source: str
    tags: list = field(default_factory=list)
    outputs: list = field(default_factory=list)

    @property
    def exported(self):
        return self.kind == "code" and re.search(r"^#\s*\|\s*exports?\b", self.source, re.MULTILINE) is not None

    @property
    def lines(self):
        "The code without directives and blank lines at its ends."
        return re.sub(r"^#\s*\|.*\n?", "", self.source, flags=re.MULTILINE).strip().splitlines()

    @property
    def tree(self):
        "The parsed code, notebook magics left out."
        return ast.parse(re.sub(r"^\s*[%!].*", "", self.source, flags=re.MULTILINE) if self.kind == "code" else "")

    @property
    def definitions(self):
        return [node for node in self.tree.body if isinstance(node, DEFINITIONS)]

    @property
    def title(self):
        return next((line for line in self.lines if line.strip()), "")[:70]


@dataclass
class Notebook:
    path: Path
    cells: list

    @property
    def name(self):
        return self.path.stem

    @property
    def number(self):
        return int(self.name[:2])

    @property
    def code(self):
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def module(self):
        "The module named by `#| default_exp`, None without one."
        found = [re.search(r"^#\s*\|\s*default_exp\s+(\S+)", cell.source, re.MULTILINE) for cell in self.code]
        return next((match[1] for match in found if match), None)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    return Notebook(Path(path), [Cell(c.cell_type, c.source, list(c.metadata.get("tags", [])), list(c.get("outputs", []))) for c in notebook.cells])


def tool_environment():
    "The environment for a command line tool: the tools of this interpreter first, and nothing that switches nbdev off."
    left = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    return {**left, "PATH": f"{BIN}{os.pathsep}{left.get('PATH', '')}"}


def run_tool(*command, cwd, **more):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=tool_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, **more)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_notebooks(destination):
    "A copy of settings.ini and nbs/ alone, as nbdev needs them."
    shutil.copy(ROOT / "settings.ini", destination)
    shutil.copytree(ROOT / "nbs", destination / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return destination


def tracked_files():
    "The files that git has or would take, None outside a repository."
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# --- rules of every notebook -------------------------------------------------------------------------------------------

def imported_modules(tree):
    "Our own modules that a piece of code imports: `from robustint.core import x` gives core."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("robustint."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "robustint":
            yield from [node.module.split(".")[1]] if "." in node.module else [name.name for name in node.names]


def star_imports(notebook):
    return [f"import * in: {cell.title}" for cell in notebook.code for node in ast.walk(cell.tree)
            if isinstance(node, ast.ImportFrom) and any(name.name == "*" for name in node.names)]


def long_cells(notebook):
    return [f"{len(cell.lines)} lines in: {cell.title}" for cell in notebook.code if len(cell.lines) > LONGEST_CELL]


def personal_paths(notebook):
    "Folders of one person's machine, in the text or in what a cell printed."
    texts = [cell.source for cell in notebook.cells] + [str(output) for cell in notebook.code for output in cell.outputs]
    return sorted({match[0] for text in texts for match in re.finditer(r"(/home/|/root/|/Users/|[A-Z]:\\\\Users)[^\s'\"<]*", text)})


def exporting_calls(notebook):
    return [f"a cell that exports: {cell.title}" for cell in notebook.code if re.search(r"\bnbdev_export\s*\(|\bnb_export\s*\(", cell.source)]


# --- rules of a component ----------------------------------------------------------------------------------------------

def upward_imports(notebook, numbers):
    "Imports of a room that does not stand below this one. numbers: {module: number of its notebook}."
    modules = {module for cell in notebook.code for module in imported_modules(cell.tree) if not module.startswith("__")}
    return [f"{notebook.name} imports {module}, which is not below it" for module in sorted(modules) if numbers.get(module, 100) >= notebook.number]


def crowded_cells(notebook):
    return [f"{len(cell.definitions)} definitions in: {cell.title}" for cell in notebook.code if cell.exported and len(cell.definitions) > 1]


def mixed_imports(notebook):
    "Exported cells that import at the top and define as well: imports have cells of their own."
    return [f"imports beside a definition in: {cell.title}" for cell in notebook.code if cell.exported and cell.definitions
            and any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.tree.body)]


def unexplained_definitions(notebook):
    "Exported definitions with no sentence directly before them; a cell of imports alone may stand between."
    found, explained = [], False
    for cell in notebook.cells:
        if cell.kind == "markdown":
            explained = bool(cell.source.strip())
        else:
            if cell.exported and cell.definitions and not explained:
                found.append(f"no sentence before: {cell.title}")
            explained = explained and bool(cell.tree.body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.tree.body)
    return found


def exported_lines(notebook):
    return sum(len([line for line in cell.lines if line.strip()]) for cell in notebook.code if cell.exported)


def failed_outputs(notebook):
    return [f"an error in the output of: {cell.title}" for cell in notebook.code for output in cell.outputs if output["output_type"] == "error"]


def commented_lines(source):
    return {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}


def parameters_of(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return [argument for argument in every if argument]


def undocumented(notebook):
    "Public exported definitions without a docstring, and parameters of functions without a comment on a line of their own."
    nodes = [(cell, node) for cell in notebook.code if cell.exported for node in cell.definitions if not node.name.startswith("_")]
    found = [f"{node.name} has no docstring" for _, node in nodes if not ast.get_docstring(node)]
    return found + [fault for cell, node in nodes if not isinstance(node, ast.ClassDef) for fault in undocumented_parameters(cell, node)]


def undocumented_parameters(cell, function):
    commented, parameters = commented_lines(cell.source), parameters_of(function)
    lines = [argument.lineno for argument in parameters]
    return [f"{function.name}: {argument.arg} has no comment on a line of its own" for argument in parameters
            if argument.lineno not in commented or lines.count(argument.lineno) > 1]


# --- rules of an experiment --------------------------------------------------------------------------------------------

def parameter_cells(notebook):
    return [cell for cell in notebook.code if "parameters" in cell.tags]


def parameter_names(notebook):
    return [target.id for cell in parameter_cells(notebook) for node in cell.tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def derived_parameters(notebook):
    "Values in the parameters cell that are not written out: papermill would set the one and leave the other as it was."
    found = []
    for cell in parameter_cells(notebook):
        for node in cell.tree.body:
            try:
                ast.literal_eval(node.value)
            except (AttributeError, ValueError, SyntaxError):
                found.append(f"not a plain value: {ast.unparse(node)}")
    return found


def experiment_faults(notebook):
    found = [f"{len(parameter_cells(notebook))} cells tagged parameters"] if len(parameter_cells(notebook)) != 1 else []
    found += [f"outputs in: {cell.title}" for cell in notebook.code if cell.outputs]
    found += [f"it exports: {cell.title}" for cell in notebook.code if cell.exported or "default_exp" in cell.source]
    found += [f"%run in: {cell.title}" for cell in notebook.code if re.search(r"^\s*%run\b", cell.source, re.MULTILINE)]
    for cell in notebook.code:
        for node in ast.walk(cell.tree):
            if isinstance(node, DEFINITIONS) and node.end_lineno - node.lineno + 1 > LONGEST_EXPERIMENT_FUNCTION:
                found.append(f"{node.name} is longer than {LONGEST_EXPERIMENT_FUNCTION} lines: put it into a component notebook")
    return found + derived_parameters(notebook)


# --- rules of the exported package -------------------------------------------------------------------------------------

NOTEBOOK_LIBRARIES = {"nbdev", "fastcore", "execnb", "papermill", "IPython", "nbformat", "nbclient", "ipywidgets"}


def top_level_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def notebook_libraries(source):
    return sorted(NOTEBOOK_LIBRARIES & set(top_level_imports(ast.parse(source))))


# --- rules of what is committed ----------------------------------------------------------------------------------------

RECORD_KEYS = {"schema", "id", "notebook", "parameters", "seed", "n", "seconds", "device", "machine", "metrics", "code", "libraries", "created"}
TABLE_COLUMNS = ["dataset", "model", "method", "weights", "paper", "ours", "low", "high", "n", "seeds"]
TABLE_AXES = {"interpretgan_table2": "pooling", "interpretgan_table3": "pooling", "icml2020_table1": "epsilon", "icml2020_table2": "attack", "icml2020_table3": "epsilon",
              "interpretgan_table1": "layer", "interpretgan_fig6": "layer", "interpretgan_fig7": "true_label", "interpretgan_fig8": "layer"}  # the fifth column
DATA_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".h5", ".gz", ".xz", ".tar", ".tgz", ".zip", ".jpg", ".jpeg", ".bin", ".parquet"}


def data_files(paths):
    "Files that belong under data/raw, which git ignores."
    return [str(path) for path in paths if path.suffix.lower() in DATA_SUFFIXES or path.name.endswith("-ubyte")]


def record_faults(record, name):
    found = [f"no {key}" for key in sorted(RECORD_KEYS - set(record))]
    if record.get("id") != name:
        found.append(f"its id is {record.get('id')!r}, its file {name}.json")
    return found
