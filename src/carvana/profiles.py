"""The parameters cells of the notebooks, which define every parameter; ranges; and profiles, checked against both."""

import ast
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from carvana.errors import UserError, did_you_mean
from carvana.files import parse_list, project_root

NOTEBOOKS = ("01_download", "02_explore", "03_train", "04_evaluate", "05_predict", "06_submit")
Values = dict[str, Any]  # parameters by name

RANGES: dict[str, tuple[float, float]] = {  # lowest and highest value; both bool, int or float like the parameter
    **dict.fromkeys(("hq", "submit", "skip_broken"), (False, True)),
    **{"demo_cars": (0, 10_000), "demo_test_cars": (1, 10_000), "holdout_cars": (0, 1_000_000)},
    **{"n_folds": (2, 100), "fold": (0, 99), "seed": (0, 2**31 - 1), "processes": (1, 64), "workers": (-1, 256)},
    **dict.fromkeys(("height", "width"), (32, 4096)),
    **dict.fromkeys(("crop_height", "crop_width"), (0, 4096)),
    **dict.fromkeys(("epochs", "validate_every"), (1, 100_000)),
    **dict.fromkeys(("batch_size", "accumulate"), (1, 1024)),
    **{"lr": (1e-9, 10.0), "weight_decay": (0.0, 10.0), "clip_norm": (0.0, 1e6), "max_hours": (0.0, 10_000.0)},
    **{"start_size": (0.25, 1.0), "warmup": (0.0, 0.9), "ema": (0.0, 0.99999), "hflip": (0.0, 1.0)},
    **dict.fromkeys(("brightness", "contrast", "saturation"), (0.0, 1.0)),
    **{"hue": (0.0, 0.5), "scale": (0.0, 0.9), "shift": (0.0, 0.9)},
    **{"rotate": (0.0, 180.0), "pseudo_share": (0.0, 1.0), "pseudo_batch": (0.01, 0.99)},
}
NAME = (
    r"(?!(cache|equal|fold \d+|without .*)$)\w[\w .+=()-]{0,99}(?<! )",  # these mean something else in the scores
    "is no name of a run. Use letters, digits, spaces and any of _ . + = ( ) -; not cache, equal, fold N, without ...",
)
TTA = r"none|hflip|scale(0?\.(2[5-9]|[3-9])\d*|[1-3](\.\d*)?|4(\.0*)?)"
TRACKERS = "aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard, trackio, wandb"
FILES = ("exclude", "ensemble", "test_dir", "sample", "accelerate_config")
CHOICES = {
    "loss": ("dice", "bce", "bce_dice", "boundary", "lovasz", "focal"),
    "schedule": ("cosine", "onecycle", "plateau", "constant"),
    "amp": ("no", "fp16", "bf16", "auto"),
    "device": ("auto", "cuda", "mps", "cpu"),
}
PATTERNS = {  # of a text, or of each item of a list, and what is said where it does not fit
    **dict.fromkeys(("run_name", "members", "init_from", "pseudo_labels"), NAME),
    "tta": (TTA, "is unknown. Choose from: none, hflip, scale0.75, scale1.25, ... from 0.25 to 4"),
    "tracker": (f"({TRACKERS})".replace(", ", "|"), f"is unknown. Choose from: {TRACKERS}"),
    **dict.fromkeys(("data_dir", "runs_dir", "submissions_dir"), (r"[^\0]+", "is no folder. Give its path")),
    **dict.fromkeys(FILES, (r"[^\0]*", "is no file. Give its path")),
}
KINDS = {bool: "True or False,", int: "a whole number", float: "a number", str: "a text in quotes"}
LISTS = ("members", "init_from", "pseudo_labels", "tta", "tracker")  # which may be empty
LINE = r"^(\w+) *= *(.*?) *(?:# *(.*))?$"  # of a parameters cell; papermill's own reader takes 2 seconds to import
WHOLE, NUMBER = r"[-+]?(0|[1-9]\d{0,18})", r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?"  # no 010, 1:30, 1_000


@dataclass
class Parameter:
    """A line of a notebook's parameters cell: default, meaning with its range, and the notebooks that have it."""

    default: Any
    help: str
    notebooks: list[str] = field(default_factory=list)


def notebook_path(name: str) -> Path:
    """Path of a notebook; UserError outside the project's folder."""
    path = project_root() / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        raise UserError(f"{path} does not exist. Call carvana in the project's folder, which holds notebooks/.")
    return path


def parameters() -> dict[str, Parameter]:
    """Every parameter of every notebook, by name, read from their parameters cells."""
    return _read(tuple(notebook_path(name) for name in NOTEBOOKS))


@cache
def _read(paths: tuple[Path, ...]) -> dict[str, Parameter]:
    by_name: dict[str, Parameter] = {}
    for path in paths:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
        for name, default, text in re.findall(LINE, source, re.M):
            low, high = RANGES.get(name, (False, True))
            span = "" if isinstance(low, bool) else f" [{low:g} to {high:g}]"
            by_name.setdefault(name, Parameter(ast.literal_eval(default), text + span)).notebooks.append(path.stem)
    return by_name


def with_defaults(values: Values) -> Values:
    """All parameters: `values`, and the defaults of those that it does not hold."""
    return {name: parameter.default for name, parameter in parameters().items()} | values


def check(values: Values) -> None:
    """UserError for a parameter outside RANGES or PATTERNS, before any work: `check(globals())` in a notebook.

    There also for what papermill has set and no notebook has.
    """
    cells: list[str] = ["", "", "", *values.get("In", [])]
    default, injected = cells[-3:-1]  # the last is the cell that calls this
    if injected.startswith("# Parameters\n"):
        for name in sorted(_assigned(injected) - _assigned(default)):
            _check_name(name, "papermill")
    for name in values.keys() & RANGES.keys():
        value, (low, high) = values[name], RANGES[name]
        try:
            fits = low <= float(value) <= high and isinstance(value, bool) == isinstance(low, bool)
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits or (isinstance(low, int) and not isinstance(value, int)):
            whole = isinstance(low, int)
            kind = f"a whole number from {low} to {high}" if whole else f"a number from {low:g} to {high:g}"
            wanted = "True or False" if isinstance(low, bool) else kind
            raise UserError(f"{name} is {repr(value)[:40]}, but must be {wanted}.")
    for name in values.keys() & CHOICES.keys():
        if (value := str(values[name])) not in CHOICES[name]:
            hint = did_you_mean(value, CHOICES[name])
            raise UserError(f'{name} "{value[:40]}" is unknown{hint} Choose from: {", ".join(CHOICES[name])}.')
    for name in values.keys() & PATTERNS.keys():
        pattern, advice = PATTERNS[name]
        items = parse_list(values[name]) if name in LISTS else [values[name]]
        if wrong := [item for item in items if not re.fullmatch(pattern, str(item))]:
            raise UserError(f"{name} {json.dumps(str(wrong[0])[:120])} {advice}.")


def _assigned(cell: str) -> set[str]:
    return {target.id for line in ast.parse(cell).body for target in getattr(line, "targets", ())}


def _check_name(name: str, source: str | Path) -> None:
    if name not in parameters():
        hint = did_you_mean(name, parameters())
        raise UserError(f'parameter "{name[:60]}" of {source} is in no notebook{hint} See: carvana params')


def load_profile(path: str | Path, overrides: dict[str, str] | None = None) -> Values:
    """Parameters of a flat YAML file, with `overrides` (as text) on top; every name, type and range is checked.

    UserError for a name that no notebook has (with the nearest one) and for a value of another type or out of range.
    """
    try:
        root = yaml.compose(Path(path).read_text("utf-8-sig"), yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"profile {path} cannot be read: {error.strerror}. Give one of profiles/*.yaml.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"profile {path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if root and not isinstance(root, yaml.MappingNode):
        raise UserError(f"profile {path} must hold lines such as `epochs: 10`.")
    defined, profile = parameters(), {}
    for name, node in [*(root.value if root else ()), *(overrides or {}).items()]:
        given = isinstance(node, str)  # by -p
        name, source = (name, "-p") if given else (str(name.value), path)
        _check_name(name, source)
        if name in profile and not given:
            raise UserError(f'parameter "{name}" stands twice in {path}. Leave one of them.')
        default = defined[name].default
        profile[name] = value = _value(node, default)
        if value is None:
            shown, kind = repr(node if given else node.value)[:60], KINDS[type(default)]
            raise UserError(f'parameter "{name}" of {source} is {shown}, but must be {kind} such as {default!r}.')
    check(profile)
    return profile


def _value(node: str | yaml.Node, default: Any) -> Any:
    """A text, or a value in YAML, as the type of a parameter's default; None where it is not of that type.

    Only what everybody reads alike is a number: not 010 (octal in YAML), 1:30 (90) or a date.
    """
    if not isinstance(node, str | yaml.ScalarNode):
        return None
    text = node if isinstance(node, str) else node.value
    if isinstance(default, str):
        return text if isinstance(node, str) or node.style or node.tag.endswith(":str") else None
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower())
    return type(default)(text) if re.fullmatch(WHOLE if isinstance(default, int) else NUMBER, text, re.I) else None
