"""The six notebooks through papermill, with the parameters of a profile; what has not changed is skipped."""

import ast
import itertools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from carvana.files import (
    OutOfTimeError,
    UserError,
    fingerprint,
    listed,
    nearest,
    project_root,
    read_json,
    resolve,
    sha256,
    stamp,
    write_json,
)

PACKAGE = Path(__file__).parent
NAMES = ("01_download", "02_explore", "03_train", "04_evaluate", "05_predict", "06_submit")


@dataclass
class Parameter:
    """A line of a notebook's parameters cell: default, meaning, and the notebooks that have it."""

    default: object
    help: str
    notebooks: list[str] = field(default_factory=list)


def notebook(name: str) -> Path:
    """Path of a notebook; UserError outside the project's folder."""
    path = project_root() / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        raise UserError(f"{path} does not exist. Call carvana from the project's folder.")
    return path


def parameters() -> dict[str, Parameter]:
    """Every parameter of every notebook, read from their parameters cells."""
    logging.getLogger("papermill").setLevel(logging.WARNING)
    found: dict[str, Parameter] = {}
    for name in NAMES:
        for key, line in papermill.inspect_notebook(str(notebook(name))).items():
            made = found.setdefault(key, Parameter(ast.literal_eval(line["default"]), line["help"]))
            made.notebooks.append(name)
    return found


def load_profile(path: str | Path, overrides: dict[str, str] | None = None) -> dict:
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
    known = parameters()
    profile |= {name: _from_text(text, known.get(name)) for name, text in (overrides or {}).items()}
    for name, value in profile.items():
        if name not in known:
            raise UserError(f'parameter "{name}" of {path} is in no notebook{nearest(name, known)} See: carvana params')
        profile[name] = _checked(path, name, value, known[name].default)
    return profile


def _from_text(text: str, parameter: Parameter | None) -> object:
    try:
        return text if parameter and isinstance(parameter.default, str) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _checked(path: str | Path, name: str, value: object, default: object) -> object:
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


@dataclass
class Step:
    """One notebook with its parameters, what it reads and what it must have written."""

    title: str
    name: str
    values: dict
    reads: list[Path]
    writes: list[Path]

    def key(self) -> str:
        """Changes when the notebook, the package, a parameter or anything it reads changes."""
        package = [stamp(path) for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".jinja")]
        reads = [stamp(path) for path in self.reads]
        return fingerprint(sha256(notebook(self.name)), package, self.values, reads)


def steps(values: dict) -> Iterator[Step]:
    """The steps of a run, in order: each notebook once, 03_train once for every fold."""
    known = parameters()
    filled = {name: parameter.default for name, parameter in known.items()} | values
    data, run = resolve(filled["data_dir"]), resolve(filled["runs_dir"]) / filled["run_name"]
    submission = resolve(filled["submissions_dir"]) / f"{filled['run_name']}.csv.gz"
    members = [run.parent / name for name in listed(filled["members"])] or [run]
    folds = range(filled["n_folds"])
    checkpoints = [member / f"fold{fold}" / "best.safetensors" for member in members for fold in folds]
    sources = [data, data / "train", data / "train_hq", data / "train_masks"]
    ensemble = resolve(filled["ensemble"]) if filled["ensemble"] else run / "ensemble.json"
    if filled["ensemble"] and ensemble.exists():
        checkpoints += [ensemble.parent / member["path"] for member in read_json(ensemble)["members"]]
    tests = [resolve(filled["test_dir"])] if filled["test_dir"] else [data / "test", data / "test_hq"]
    exclude = [resolve(filled["exclude"])] if filled["exclude"] else []
    plan = [("01_download", {}, [], [data])]
    plan += [("02_explore", {}, [*sources, *exclude], [])]
    if run in members:
        written = [[run / f"fold{fold}" / "last.safetensors"] for fold in folds]
        plan += [("03_train", {"fold": fold}, [*sources, *exclude], written[fold]) for fold in folds]
    plan += [("04_evaluate", {}, [*sources, *exclude, *checkpoints], [run / "scores.csv", run / "ensemble.json"])]
    plan += [("05_predict", {}, [data, *tests, ensemble, *checkpoints], [submission])]
    plan += [("06_submit", {}, [data, submission], [run / "submission.json"])]
    for name, extra, reads, writes in plan:
        wanted = {key: value for key, value in (values | extra).items() if name in known[key].notebooks}
        title = name + "".join(f"_{key}{value}" for key, value in extra.items())
        yield Step(title, name, wanted, reads, writes)


def run(profile: str | Path, overrides: dict[str, str] | None = None, hours: float = 0) -> list[str]:
    """Run every step of a profile that is not done yet; returns the lines that tell where the results are.

    hours: OutOfTimeError after so many, everything done being kept; 0 for no limit.
    """
    ends = time.monotonic() + 3600 * hours if hours else math.inf
    values = load_profile(profile, overrides)
    known = parameters()
    run_name, runs_dir = (values.get(name, known[name].default) for name in ("run_name", "runs_dir"))
    folder = resolve(runs_dir) / run_name
    tame_allocator()
    for _, group in itertools.groupby(steps(values), key=lambda step: step.name):
        _run_group(list(group), folder, ends)
    return results(folder)


def _run_group(group: list[Step], folder: Path, ends: float) -> None:
    """Execute the steps of one notebook that are not done: folds in a lane for each GPU, the rest one by one."""
    note = folder / "steps.json"
    done = read_json(note) if note.exists() else {}
    keys = {step.title: step.key() for step in group}  # of the inputs as they are before the work
    todo = [step for step in group if not _is_done(step, folder, done.get(step.title, {}), keys[step.title])]
    for step in group:
        print(f"{step.title}: {'running' if step in todo else 'nothing has changed, skipped'}", flush=True)
    lock = threading.Lock()

    def finish(lane: list[Step]) -> None:
        for step in lane:
            seconds = execute(step.name, _output(step, folder), _limited(step, ends))
            print(f"{step.title}: done in {seconds:.0f} s", flush=True)
            with lock:
                done[step.title] = {"key": keys[step.title], "seconds": round(seconds, 1)}
                write_json(note, done)

    gpus = _gpus() if len(todo) > 1 and todo[0].values.get("processes", 1) == 1 else 1
    if gpus == 1:  # in the main thread, where an interruption reaches the notebook
        finish(todo)
        return
    lanes = [[step for step in todo if step.values["fold"] % gpus == gpu] for gpu in range(gpus)]
    with ThreadPoolExecutor(gpus) as pool:
        list(pool.map(finish, lanes))


def _limited(step: Step, ends: float) -> dict:
    """Values of a step that is to end at `ends`, where its notebook knows max_hours."""
    left, own = (ends - time.monotonic()) / 3600, step.values.get("max_hours", 0) or math.inf
    if left <= 0:
        raise OutOfTimeError(f"The hours given are over before {step.title}. Run the same command to go on.")
    limited = min(left, own) < math.inf and step.name in parameters()["max_hours"].notebooks
    return step.values | ({"max_hours": min(left, own)} if limited else {})


def _is_done(step: Step, folder: Path, done: dict, key: str) -> bool:
    return done.get("key") == key and all(path.exists() for path in [_output(step, folder), *step.writes])


def _output(step: Step, folder: Path) -> Path:
    return folder / "notebooks" / f"{step.title}.ipynb"


def _gpus() -> int:
    """Lanes of folds that train at the same time: 03_train takes the GPU of its fold's number."""
    import torch  # takes seconds, and a run in which nothing has changed does not need it

    return max(1, torch.cuda.device_count())


def execute(name: str, output: Path, values: dict) -> float:
    """Execute a notebook with papermill, its streams going to ours; returns seconds.

    UserError with the one line that the notebook ended with.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook(name)), str(output), values, kernel_name="python3", cwd=str(project_root()),
            progress_bar=False, stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except PapermillExecutionError as error:
        kind = {kind.__name__: kind for kind in (UserError, OutOfTimeError)}.get(error.ename)
        if kind:
            raise kind(error.evalue) from error
        reason = f"{error.ename}: {error.evalue}"
        raise UserError(f"{name} failed with {reason}. Its cells are in {output}.") from error
    except DeadKernelError as error:
        reason = "its process was killed, most likely because memory ran out"
        raise UserError(f"{name}: {reason}. Lower batch_size or workers.") from error
    return time.monotonic() - began


def results(folder: Path) -> list[str]:
    """Where the submission, the notebooks and the scores of a run are; last the true Dice where it is known."""
    found = read_json(folder / "submission.json")
    lines = [
        f"submission  {found['path']} ({found['rows']} pictures, valid)",
        f"notebooks   {folder / 'notebooks'}",
        f"scores      {folder / 'scores.csv'}, report {folder / 'report.html'}",
    ]
    return [*lines, f"true Dice {found['true_dice']:.6f}"] if "true_dice" in found else lines


def tame_allocator() -> None:
    """Keep freed memory in the process: glibc otherwise returns and faults in every large tensor again.

    Training on a CPU is 1.16 (bf16) to 1.3 times (float32) faster. Set before the kernels start; others ignore it.
    """
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31 - 1))
    os.environ.setdefault("MALLOC_TOP_PAD_", str(256 << 20))
