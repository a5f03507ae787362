"""The parameters cells of the notebooks, which define every parameter, and profiles, checked against them."""

import ast
import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import papermill
import yaml

from carvana.errors import UserError, did_you_mean
from carvana.files import project_root

NOTEBOOKS = ("01_download", "02_explore", "03_train", "04_evaluate", "05_predict", "06_submit")
Values = dict[str, Any]  # parameters by name


@dataclass
class Parameter:
    """A line of a notebook's parameters cell: default, meaning, and the notebooks that have it."""

    default: Any
    help: str
    notebooks: list[str] = field(default_factory=list)


def notebook_path(name: str) -> Path:
    """Path of a notebook; UserError outside the project's folder."""
    path = project_root() / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        raise UserError(f"{path} does not exist. Call carvana from the project's folder.")
    return path


def parameters() -> dict[str, Parameter]:
    """Every parameter of every notebook, by name, read from their parameters cells."""
    return _read(tuple(notebook_path(name) for name in NOTEBOOKS))


@cache
def _read(paths: tuple[Path, ...]) -> dict[str, Parameter]:
    logging.getLogger("papermill").setLevel(logging.WARNING)
    by_name: dict[str, Parameter] = {}
    for path in paths:
        for name, line in papermill.inspect_notebook(str(path)).items():
            parameter = by_name.setdefault(name, Parameter(ast.literal_eval(line["default"]), line["help"]))
            parameter.notebooks.append(path.stem)
    return by_name


def with_defaults(values: Values) -> Values:
    """All parameters: `values`, and the defaults of those that it does not hold."""
    return {name: parameter.default for name, parameter in parameters().items()} | values


def load_profile(path: str | Path, overrides: dict[str, str] | None = None) -> Values:
    """Parameters of a flat YAML file, with `overrides` (as text) on top; every name and type is checked.

    UserError for a name that no notebook has (with the nearest one) and for a value of another type.
    """
    try:
        profile = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UserError(f"profile {path} cannot be read: {error.strerror}. Give one of profiles/*.yaml.") from error
    except yaml.YAMLError as error:
        raise UserError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(profile, dict):
        raise UserError(f"profile {path} must hold lines such as `epochs: 10`.")
    defined = parameters()
    profile |= {name: _from_text(text, defined.get(name)) for name, text in (overrides or {}).items()}
    for name, value in profile.items():
        if name not in defined:
            hint = did_you_mean(name, defined)
            raise UserError(f'parameter "{name}" of {path} is in no notebook{hint} See: carvana params')
        profile[name] = _checked(path, name, value, defined[name].default)
    return profile


def _from_text(text: str, parameter: Parameter | None) -> Any:
    try:
        return text if parameter and isinstance(parameter.default, str) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _checked(path: str | Path, name: str, value: Any, default: Any) -> Any:
    """`value` with the type of the parameter's default; a whole number or 1e-4 (text in YAML) may stand for a float."""
    wanted = type(default)
    if wanted is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if wanted is str and value is None:
        return ""
    if type(value) is not wanted:
        like = f"{wanted.__name__} such as {default!r}"
        raise UserError(f'parameter "{name}" of {path} is {value!r}, but must be {like}.')
    return value
