"""The six notebooks through papermill, with the parameters of a profile; what has not changed is skipped."""

import glob
import itertools
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from carvana.data.competition import Competition
from carvana.errors import OutOfTimeError, UserError
from carvana.files import fingerprint, locked, optional_path, project_root, resolve, sha256, stamp, sweep
from carvana.members import members_of
from carvana.parallel import sharing, tame_allocator
from carvana.preflight import check_inputs
from carvana.profiles import Values, load_profile, notebook_path, parameters, with_defaults
from carvana.run import Run, member_paths

PACKAGE = Path(__file__).parent


@dataclass
class Step:
    """One notebook with its parameters, what it reads, and what of its writings the next ones need.

    sealed: what it has written and nobody else may change.
    """

    title: str
    notebook: str
    values: Values
    reads: list[Path]
    writes: list[Path]
    sealed: list[Path]

    def key(self) -> str:
        """Changes when the notebook, the package, a parameter or anything it reads changes."""
        package = [stamp(path) for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".jinja")]
        reads = [stamp(path) for path in self.reads]
        values = {name: value for name, value in self.values.items() if name != "tracker"}  # it only watches
        return fingerprint(sha256(notebook_path(self.notebook)), package, values, reads)

    def sealed_key(self, key: str) -> str:
        """A key that also changes when anybody changes what is sealed."""
        return fingerprint(key, *[stamp(path) for path in self.sealed])


def steps(profile: Values) -> Iterator[Step]:
    """The steps of a run, in order: each notebook once, 03_train once for every fold."""
    values, defined = with_defaults(profile), parameters()
    competition = Competition(values["data_dir"], values["hq"])
    run = Run(values["runs_dir"], values["run_name"])
    members = members_of(values) or [run]
    folds = range(values["n_folds"])
    submission = resolve(values["submissions_dir"]) / f"{run.name}.csv.gz"
    checkpoints = [member.checkpoint(fold) for member in members for fold in folds]
    ensemble = optional_path(values["ensemble"]) or run.ensemble_path
    predicts_with = [ensemble, *checkpoints]
    if values["ensemble"] and ensemble.exists():
        predicts_with += member_paths(ensemble)
    tests = [resolve(values["test_dir"])] if values["test_dir"] else competition.test_files
    tests = [competition.folder, *tests, *([resolve(values["sample"])] if values["sample"] else [])]
    samples = [*competition.training_files, *([resolve(values["exclude"])] if values["exclude"] else [])]

    def step(
        notebook: str, reads: list[Path], writes: list[Path], sealed: Sequence[Path] = (), **extra: int
    ) -> Step:  # fmt: skip
        shown = {name: value for name, value in (profile | extra).items() if notebook in defined[name].notebooks}
        title = notebook + "".join(f"_{name}{value}" for name, value in extra.items())
        return Step(title, notebook, shown, reads, writes, list(sealed))

    images = [competition.place("train"), *([] if values["test_dir"] else [competition.place("test")])]
    yield step("01_download", [], [competition.folder, *images])
    yield step("02_explore", samples, [])
    for fold in folds if run.name in [member.name for member in members] else ():
        start = [Run(run.runs_dir, values["init_from"]).checkpoint(fold)] if values["init_from"] else []
        start += [Run(run.runs_dir, values["pseudo_labels"]).pseudo_path] if values["pseudo_labels"] else []
        yield step("03_train", [*samples, *start], [run.checkpoint(fold), run.folds_path], fold=fold)
    yield step("04_evaluate", [*samples, *checkpoints], [run.scores_path, run.ensemble_path])
    kept = [run.pseudo_path] if values["pseudo_share"] else []
    yield step("05_predict", [*tests, *predicts_with], [submission, *kept], sealed=[submission])
    yield step("06_submit", [*tests, submission], [run.submission_path])


def run(profile: str | Path, overrides: dict[str, str] | None = None, hours: float = 0) -> list[str]:
    """Run every step of a profile that is not done yet; returns the lines that tell where the results are.

    hours: OutOfTimeError after so many, everything done being kept; 0 for no limit.
    """
    ends = time.monotonic() + 3600 * hours if hours else math.inf
    values = load_profile(profile, overrides)
    names = with_defaults(values)
    of_profile = Run(names["runs_dir"], names["run_name"])
    check_inputs(names)
    with nullcontext() if names["accelerate_config"] else locked(of_profile.folder / ".lock", "this run"):
        submissions = resolve(names["submissions_dir"]).glob(f".{glob.escape(of_profile.name)}.csv.gz.*")
        sweep([*of_profile.folder.rglob(".*"), *submissions])
        tame_allocator()
        for _, group in itertools.groupby(steps(values), key=lambda step: step.notebook):
            _run_group(list(group), of_profile, ends)
        return list(of_profile.result_lines())


def _run_group(group: list[Step], run: Run, ends: float) -> None:
    """Execute the steps of one notebook that are not done: folds in a lane for each GPU, the others one by one."""
    done = run.note("steps")
    keys = {step.title: step.key() for step in group}  # of the inputs as they are before the work
    todo = [step for step in group if not _is_done(step, run, done.get(step.title, {}), keys[step.title])]
    for step in group:
        print(f"{step.title}: {'running' if step in todo else 'nothing has changed, skipped'}", flush=True)
    lock = threading.Lock()

    def finish(lane: list[Step]) -> None:
        for step in lane:
            seconds = execute(step.notebook, run.notebook(step.title), _limited(step, ends))
            print(f"{step.title}: done in {seconds:.0f} s", flush=True)
            with lock:
                done[step.title] = {"key": step.sealed_key(keys[step.title]), "seconds": round(seconds, 1)}
                run.write_note("steps", done)

    of_gpus = lanes(todo)
    if len(of_gpus) == 1:  # in the main thread, where an interruption reaches the notebook
        finish(todo)
        return
    with sharing(len(of_gpus)), ThreadPoolExecutor(len(of_gpus)) as pool:
        _await([pool.submit(finish, lane) for lane in of_gpus])


def _await(finishes: list[Future[None]]) -> None:
    """Wait for all lanes; the first failure, or Ctrl-C, ends the other kernels: their folds go on from state.pt."""
    try:
        for finished in as_completed(finishes):
            if not isinstance(finished.exception(), OutOfTimeError):  # which the others are about to meet, and save
                finished.result()
    except BaseException:
        while wait(finishes, timeout=0.1).not_done:  # a lane between two steps may start one more
            for kernel in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    kernel.kill()
        raise
    for finished in finishes:
        finished.result()


def lanes(todo: list[Step]) -> list[list[Step]]:
    """Steps that run one after the other: 03_train takes the GPU of its fold's number, so folds have one a GPU."""
    values = todo[0].values if todo else {}
    shared = values.get("processes", 1) > 1 or values.get("accelerate_config")
    if len(todo) < 2 or shared or values.get("device") == "cpu":
        return [todo]
    from carvana import device  # torch takes seconds, and a run in which nothing has changed needs none

    gpus = max(1, device.gpu_count())
    by_gpu = ([step for step in todo if step.values["fold"] % gpus == gpu] for gpu in range(gpus))
    return [lane for lane in by_gpu if lane]


def _limited(step: Step, ends: float) -> Values:
    """Values of a step that is to end at `ends`, where its notebook knows max_hours."""
    left, limit = (ends - time.monotonic()) / 3600, step.values.get("max_hours", 0) or math.inf
    if left <= 0:
        raise OutOfTimeError(f"The hours given are over before {step.title}. Run the same command to go on.")
    limited = min(left, limit) < math.inf and step.notebook in parameters()["max_hours"].notebooks
    return step.values | ({"max_hours": min(left, limit)} if limited else {})


def _is_done(step: Step, run: Run, note: Values, key: str) -> bool:
    there = all(path.exists() for path in [run.notebook(step.title), *step.writes])
    return there and note.get("key") == step.sealed_key(key)


def execute(notebook: str, output: Path, values: Values) -> float:
    """Execute a notebook with papermill, its streams going to ours; returns seconds.

    UserError with the one line that the notebook ended with.
    """
    began = time.monotonic()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook_path(notebook), output)]
        papermill.execute_notebook(  # which formats the paths
            *paths, values, kernel_name="python3", cwd=str(project_root()), progress_bar=False,
            stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
    except PapermillExecutionError as error:
        if kind := {kind.__name__: kind for kind in (UserError, OutOfTimeError)}.get(error.ename):
            raise kind(error.evalue) from error
        raise UserError(f"{notebook} failed with {error.ename}: {error.evalue}. Its cells are in {output}.") from error
    except DeadKernelError as error:
        reason = "its process was killed, most likely because memory ran out"
        raise UserError(f"{notebook}: {reason}. Lower batch_size or workers.") from error
    except BrokenPipeError:  # who reads our output has seen enough, as in `carvana run PROFILE | head`
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{output} could not be written: {reason}. Free space or choose another folder.") from error
    return time.monotonic() - began
