"""The package's shape: imports run down, functions stay short, privates stay at home, Kaggle comes only when asked."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import carvana
from carvana import plots
from carvana.files import project_root

ORDER = [
    "errors", "files", "profiles", "parallel", "device", "rle", "grid", "metrics",
    "data.images", "data.competition", "data.folds", "data.dataset", "data.statistics", "data.demo",
    "run", "members", "classic_unet", "models", "tracking",
    "training.losses", "training.recipe", "training.state", "training.validation", "training.trainer",
    "training.launch",
    "inference.logits", "inference.ensemble", "inference.loader", "inference.predict",
    "evaluation.label_issues", "evaluation.scoring", "evaluation.evaluate",
    "submission", "export", "preflight", "pipeline",
    "kaggle.credentials", "kaggle.client", "kaggle.upload", "kaggle.download", "kaggle.submit", "kaggle.inside",
    "kaggle.kernels", "kaggle.session", "doctor",
    "plots.style", "plots.overlays", "plots.explore", "plots.scores", "plots.training", "plots.browser", "plots.report",
    "cli",
]  # fmt: skip
PACKAGE = Path(carvana.__file__).parent
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SCRIPTS = sorted([*(project_root() / "bench").glob("*.py"), *(project_root() / "tests").rglob("*.py")])


def source(name):
    return PACKAGE / f"{name.replace('.', '/')}.py"


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Modules of the package that a file imports; names that a folder hands on count as the folder."""
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not getattr(node, "level", 0) and not any(name.startswith("carvana.") for name in names), path
        top, _, inner = (node.module or "" if isinstance(node, ast.ImportFrom) else "").partition(".")
        if top != "carvana":
            continue
        modules = {f"{inner}.{name.name}".lstrip(".") for name in node.names} & {*ORDER, *FOLDERS}
        yield from modules or {inner}


def last_place(name):
    """Place in the order of a module, or of the last module that a folder hands on."""
    return max(i for i, module in enumerate(ORDER) if module == name or module.startswith(f"{name}."))


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def test_every_module_has_its_place():
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert files - {f"{folder}.__init__" for folder in FOLDERS} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name):
    below = [module for module in imported(source(name)) if last_place(module) >= ORDER.index(name)]
    assert not below


def test_rooms_that_must_not_know_each_other_do_not():
    rooms = {folder: {m for path in (PACKAGE / folder).glob("*.py") for m in imported(path)} for folder in FOLDERS}
    assert not [module for module in rooms["training"] if module.startswith(("inference", "evaluation"))]
    assert not [module for module in rooms["inference"] if module.startswith(("training", "evaluation"))]
    assert {module.partition(".")[0] for module in imported(source("pipeline"))}.isdisjoint({*FOLDERS} - {"data"})


@pytest.mark.parametrize("name", ORDER)
def test_a_module_is_read_in_one_sitting(name):
    assert len(source(name).read_text(encoding="utf-8").splitlines()) <= 300
    for function in functions(source(name)):
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        parameters = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
        assert function.end_lineno - function.lineno < 40, f"{function.name} is too long"
        assert len(parameters) <= 5, f"{function.name} has {len(parameters)} parameters"


def private_names(path):
    """Names with one underscore that a module defines, for itself alone."""
    for node in ast.walk(tree(path)):
        name = getattr(node, "name", None) or getattr(node, "attr", None) or getattr(node, "id", "")
        written = isinstance(getattr(node, "ctx", None), ast.Store) or isinstance(node, ast.FunctionDef | ast.ClassDef)
        if written and name.startswith("_") and not name.endswith("_"):  # Jupyter calls _repr_png_
            yield name


def test_private_names_are_used_by_their_own_module_alone():
    homes = {}
    for name in ORDER:
        for private in private_names(source(name)):
            homes.setdefault(private, set()).add(source(name))
    for path in [*map(source, ORDER), *SCRIPTS]:
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            foreign = [name for name in names if name in homes and path not in homes[name]]
            assert not foreign, f"{path}, line {node.lineno}: {foreign}"


RNG = {"get_rng_state", "set_rng_state"}  # which are saved, not asked for a capability
COUNTS = {"cpu_count", "process_cpu_count", "sched_getaffinity"}


def test_devices_and_cores_are_asked_for_in_one_place_each():
    for name in {*ORDER} - {"device"}:
        for node in ast.walk(tree(source(name))):
            if not isinstance(node, ast.Attribute):
                continue
            place, owner = f"{name}, line {node.lineno}: {node.attr}", ast.unparse(node.value)
            assert owner not in ("torch.accelerator", "torch.backends.mps", "torch.mps"), place
            assert owner != "torch.cuda" or node.attr in RNG, place
            assert name == "parallel" or node.attr not in COUNTS, place
    names = [alias.name for name in ORDER for node in ast.walk(tree(source(name)))
             if isinstance(node, ast.ImportFrom) for alias in node.names]  # fmt: skip
    assert {*names}.isdisjoint({"cuda", *COUNTS})


@pytest.mark.parametrize("name", ORDER)
def test_kaggle_is_imported_where_it_is_called_alone(name):
    """Importing it signs in."""
    for node in ast.walk(tree(source(name))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        if any(module.partition(".")[0] in ("kaggle", "kagglesdk") for module in modules):
            assert name == "kaggle.client" and node.col_offset


@pytest.mark.parametrize("name", ["01_download", "02_explore", "06_submit"])
def test_who_trains_and_predicts_nothing_never_waits_for_torch(name):
    cells = json.loads((project_root() / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
    imports = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = f"{imports}\nfrom carvana.plots import explore, report\nimport sys\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "carvana.plots.report" in modules
    assert {"torch", "kaggle"}.isdisjoint(modules)


def test_every_figure_is_where_plots_says_and_nothing_else_is():
    assert all(getattr(plots, name) is not None for name in dir(plots))
    assert all(name in dir(plots) for name in ("areas", "browse", "train_live"))
    with pytest.raises(AttributeError, match="carvana.plots has no arias"):
        plots.arias  # noqa: B018
