"""The package's shape: modules import in one direction, stay readable in one sitting, and Kaggle only when asked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import carvana

ORDER = [
    "files",
    "rle",
    "grid",
    "metrics",
    "losses",
    "photos",
    "folds",
    "dataset",
    "models",
    "recipe",
    "state",
    "training",
    "inference",
    "prediction",
    "scoring",
    "evaluation",
    "submission",
    "ledger",
    "kaggle_api",
    "transfer",
    "entry",
    "demo",
    "figures",
    "score_figures",
    "overlays",
    "live",
    "browser",
    "report",
    "pipeline",
    "kernels",
    "cli",
]
PACKAGE = Path(carvana.__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "carvana":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("carvana."):
            yield node.module.partition(".")[2]


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name):
    above = ORDER[: ORDER.index(name)]
    assert set(imported(PACKAGE / f"{name}.py")) <= set(above)


def test_the_pipeline_knows_only_files():
    assert set(imported(PACKAGE / "pipeline.py")) == {"files"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_is_read_in_one_sitting(name):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 320


def test_importing_everything_never_imports_kaggle():
    code = f"import sys; from carvana import {', '.join(ORDER)}; sys.exit('kaggle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
