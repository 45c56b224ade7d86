"""Words in the parameters of a run: one that names nothing is refused before anything is trained."""
import os
import subprocess
import sys

import pytest
from conftest import one_line
from house import BIN, ROOT

from robustint.jobs import check_parameters, known_values

WORDS = [("run_interpretgan", "kind", "lambda_0", "lambda0"), ("run_interpretgan", "kind", "inversion", "invert"), ("run_interpretgan", "tables", "mnits", "mnist"),
         ("run_interpretgan", "loss", "nonsaturated", "nonsaturating"), ("run_diagnosis", "regions", "faces", "face")]


@pytest.mark.parametrize("notebook, name, word, near", WORDS)
def test_a_misspelt_word_is_refused_with_the_nearest_one(notebook, name, word, near):
    with pytest.raises(ValueError) as error:
        check_parameters(notebook, {name: word})
    assert f"no {name} is called {word!r}: did you mean {near}?" == one_line(error)
    for value in known_values()[name]:
        check_parameters(notebook, {name: value})


@pytest.mark.parametrize("notebook, name, word", [("run_interpretgan", "kind", "lambda_0"), ("run_diagnosis", "regions", "faces")])
def test_the_run_notebook_itself_refuses_it(notebook, name, word, tmp_path):
    "Papermill asks nobody: the notebook must look at its own words, before it reads an image."
    told = [word for key in ("records", "networks", "runs") for word in ("-p", key, str(tmp_path))]
    line = [sys.executable, "-m", "papermill", str(ROOT / f"nbs/experiments/{notebook}.ipynb"), str(tmp_path / "out.ipynb"), "-p", name, word, *told, "--no-progress-bar"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"})
    assert done.returncode == 1 and f"no {name} is called {word!r}" in done.stderr
    assert not list(tmp_path.glob("*.json"))
