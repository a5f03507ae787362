"""The package's shape: modules import in one direction, stay readable in one sitting, and Kaggle only when asked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import carvana

ORDER = [
    "files", "rle", "grid", "metrics",
    "data.competition", "data.folds", "data.dataset", "data.demo",
    "models",
    "training.losses", "training.recipe", "training.state", "training.trainer",
    "inference.ensemble", "inference.predict",
    "evaluation.scoring", "evaluation.evaluate",
    "submission",
    "kaggle.ledger", "kaggle.client", "kaggle.download", "kaggle.submit",
    "plots.explore", "plots.scores", "plots.overlays", "plots.training", "plots.browser", "plots.report",
    "pipeline", "kaggle.kernels", "cli",
]  # fmt: skip
PACKAGE = Path(carvana.__file__).parent
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def source(name):
    return PACKAGE / f"{name.replace('.', '/')}.py"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        top, _, inner = (node.module or "" if isinstance(node, ast.ImportFrom) else "").partition(".")
        if top != "carvana":
            continue
        if inner in ("", *FOLDERS):  # the imported names are modules
            yield from (f"{inner}.{name.name}".lstrip(".") for name in node.names)
        else:
            yield inner


def test_every_module_has_its_place():
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert files - {f"{folder}.__init__" for folder in FOLDERS} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name):
    above = ORDER[: ORDER.index(name)]
    assert set(imported(source(name))) <= set(above)


def test_the_pipeline_knows_only_files():
    assert set(imported(source("pipeline"))) == {"files"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_is_read_in_one_sitting(name):
    assert len(source(name).read_text().splitlines()) <= 320


def test_importing_everything_never_imports_kaggle():
    modules = ", ".join(f"carvana.{name}" for name in ORDER)
    code = f"import sys, {modules}; sys.exit('kaggle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
