"""The command line: `carvana ...`, the same as `python -m carvana ...`."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from carvana.errors import UserError

Action: TypeAlias = Callable[[argparse.Namespace], int | None]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
STARTS = "; a relative one starts at the project's folder"
RUNS_DIR: dict[str, Any] = {"type": Path, "default": Path("runs"), "help": f"folder of all runs{STARTS}"}
SUBMISSIONS_DIR = RUNS_DIR | {"default": Path("submissions"), "help": f"folder of ledger.csv{STARTS}"}
PARAMETER: dict[str, Any] = {
    "nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE"),
    "help": "a parameter in the place of the profile's, may be repeated; `carvana params` lists them",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when it did its work, 1 with one line on standard error when not."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as in `carvana params | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            raise
        print(f"carvana: {_line(error)}", file=sys.stderr)
        return 1


def _line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on where it was"
    from carvana.kaggle.credentials import scrub  # takes a moment, and who knows what an unexpected error quotes

    return f"{type(error).__name__}: {scrub(error)} (--debug shows where)"


def _run(options: argparse.Namespace) -> None:
    from carvana import pipeline

    print("\n".join(pipeline.run(options.profile, dict(options.parameter))))


def _params(options: argparse.Namespace) -> None:
    from carvana.profiles import parameters

    for name, parameter in sorted(parameters().items()):
        notebooks = " ".join(notebook[:2] for notebook in parameter.notebooks)
        print(f"{name:18}{parameter.default!r:24}{notebooks:20}{parameter.help}")


def _doctor(options: argparse.Namespace) -> int:
    from carvana.doctor import examine

    stopped = False
    for state, name, seen in examine(options.profile, dict(options.parameter)):
        print(f"{state:5}{name:12}{seen}", flush=True)
        stopped |= state == "STOP"
    return stopped


def _demo_data(options: argparse.Namespace) -> None:
    from carvana.data import demo

    demo.write_competition(options.folder, options.cars, options.test_cars, options.seed)
    print(f"{options.folder} holds the demo competition: {options.cars} cars to train on, {options.test_cars} to test.")


def _download(options: argparse.Namespace) -> None:
    from carvana.files import resolve
    from carvana.kaggle.download import download

    download(resolve(options.data_dir), options.files, options.hq)


def _compare(options: argparse.Namespace) -> None:
    from carvana.run import Run, compare

    table = compare([Run(options.runs_dir, name) for name in options.runs])
    print(table.to_string(index=False, float_format="{:.6f}".format))


def _export(options: argparse.Namespace) -> None:
    from carvana.export import export

    print("\n".join(export(options.source, options.out, options.format, options.fold)))


def _validate(options: argparse.Namespace) -> int:
    from carvana.submission import Expected, validate

    if not options.file.exists():
        raise UserError(f"{options.file} does not exist. Give a submission: csv, csv.gz or csv.zip.")
    validation = validate(options.file, Expected(options.sample, options.height, options.width))
    print("\n".join(validation.lines()))
    return 0 if validation.ok else 1


def _score(options: argparse.Namespace) -> None:
    from carvana.files import write_text
    from carvana.submission import score

    scores = score(options.file, options.truth)
    if options.csv:
        write_text(options.csv, scores.to_csv(index=False))
    print(f"Dice {scores['dice'].mean():.6f}  IoU {scores['iou'].mean():.6f}  {len(scores)} images")


def _submit(options: argparse.Namespace) -> None:
    from carvana.files import resolve
    from carvana.kaggle.submit import Entry, submit
    from carvana.submission import Expected

    run_name = options.run_name or re.sub(r"(\.csv)?(\.gz|\.zip)?$", "", options.file.name)
    entry = Entry(options.file, options.message, run_name, options.again)
    expected = Expected(options.sample, options.height, options.width)
    submit(entry, expected, resolve(options.submissions_dir), options.yes)


def _kernel_build(options: argparse.Namespace) -> None:
    from carvana.kaggle import credentials, kernels

    user, wheels = options.user or credentials.username(), not options.no_wheels
    kernels.build(kernels.KernelPlan(options.profile, user, options.weights, options.python, wheels), options.folder)
    size = sum(path.stat().st_size for path in (options.folder / "dataset").iterdir()) / 1e6
    print(f"{options.folder} is ready, {size:.0f} MB. Next: carvana kernel push {shlex.quote(str(options.folder))}")


def _kernel_push(options: argparse.Namespace) -> None:
    from carvana.kaggle import kernels, session

    if options.wait:
        session.push_and_wait(options.folder, options.resume, options.runs_dir)
        return
    kernel = kernels.push(options.folder, options.resume)
    print(f"{kernel} runs on Kaggle. Follow it and fetch its files with:")
    print(f"  carvana kernel push {shlex.quote(str(options.folder))} --wait")


def _ledger(options: argparse.Namespace) -> None:
    from carvana.files import resolve
    from carvana.kaggle.submit import ledger_rows, ledger_table, refresh

    submissions_dir = resolve(options.submissions_dir)
    if not submissions_dir.is_dir():
        raise UserError(f"{submissions_dir} is no folder. Give the one of ledger.csv: --submissions-dir")
    if not options.offline and ledger_rows(submissions_dir / "ledger.csv"):
        refresh(submissions_dir)
    table = ledger_table(submissions_dir, options.runs_dir)
    text = table.to_string(index=False, float_format="{:.6f}".format, na_rep="-")
    print(text if len(table) else "No submission yet.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("carvana", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run_commands(commands)
    _add_data_commands(commands)
    _add_submission_commands(commands)
    _add_kernel_commands(commands)
    return parser


def _add_run_commands(commands: Commands) -> None:
    run = _command(commands, "run", _run, "run the notebooks with a profile")
    run.add_argument("profile", type=Path, help="a YAML file of parameters, such as profiles/demo.yaml")
    run.add_argument("-p", "--parameter", **PARAMETER)
    _command(commands, "params", _params, "list the parameters of all notebooks")
    doctor = _command(commands, "doctor", _doctor, "say what this machine has for a run, and what to do about the rest")
    doctor.add_argument("profile", type=Path, nargs="?", help="the YAML file that shall run; default: none")
    doctor.add_argument("-p", "--parameter", **PARAMETER)
    compare = _command(commands, "compare", _compare, "compare the Dice of runs on the images that all have scored")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="names in the folder of all runs")
    compare.add_argument("--runs-dir", **RUNS_DIR)
    export = _command(commands, "export", _export, "write a trained network for programs without this package")
    export.add_argument("source", type=Path, help="a run's folder, a checkpoint or an ensemble.json")
    export.add_argument("out", type=Path, help="folder (smp) or file (onnx) to write; its card is written beside")
    export.add_argument("--format", required=True, choices=("smp", "onnx"), help="segmentation_models_pytorch or ONNX")
    export.add_argument("--fold", type=int, help="one fold of the run; default: its ensemble.json, or its only fold")


def _add_data_commands(commands: Commands) -> None:
    demo = _command(commands, "demo-data", _demo_data, "write the built-in demo competition")
    demo.add_argument("folder", type=Path, help="where it is written")
    demo.add_argument("--cars", type=int, default=12, help="cars to train on, 16 images each")
    demo.add_argument("--test-cars", type=int, default=4, help="cars of the test set, 16 images each")
    demo.add_argument("--seed", type=int, default=1, help="another one draws other cars")
    download = _command(commands, "download", _download, "fetch the competition's files from Kaggle")
    download.add_argument("--data-dir", type=Path, default=Path("data/carvana"), help=f"folder to fill{STARTS}")
    download.add_argument("--files", nargs="+", help="names on Kaggle; default: what training and prediction need")
    download.add_argument("--hq", action="store_true", help="the _hq images instead of the usual ones")


def _add_submission_commands(commands: Commands) -> None:
    validate = _command(commands, "validate", _validate, "check a submission file")
    validate.add_argument("file", type=Path, help="the submission: csv, csv.gz or csv.zip")
    _add_expected(validate)
    score = _command(commands, "score", _score, "score a submission against true masks")
    score.add_argument("file", type=Path, help="the submission: csv, csv.gz or csv.zip")
    score.add_argument("--truth", type=Path, required=True, help="csv of img,rle_mask")
    score.add_argument("--csv", type=Path, help="write a row per image to this file")
    submit = _command(commands, "submit", _submit, "validate, upload and wait for the score")
    submit.add_argument("file", type=Path, help="the submission: csv, csv.gz or csv.zip")
    submit.add_argument("-m", "--message", required=True, help="its description on Kaggle")
    submit.add_argument("--yes", action="store_true", help="do not ask")
    submit.add_argument("--again", action="store_true", help="send again what was, or may have been, sent before")
    submit.add_argument("--submissions-dir", **SUBMISSIONS_DIR)
    submit.add_argument("--run-name", default="", help="that made the file; default: the file's own name")
    _add_expected(submit)
    ledger = _command(commands, "ledger", _ledger, "list submissions with their scores, refreshed from Kaggle")
    ledger.add_argument("--submissions-dir", **SUBMISSIONS_DIR)
    ledger.add_argument("--runs-dir", **RUNS_DIR)
    ledger.add_argument("--offline", action="store_true", help="do not ask Kaggle")


def _add_expected(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sample", type=Path, required=True, help="sample_submission.csv, also zipped")
    command.add_argument("--height", type=int, default=1280, help="of the images, in pixels")
    command.add_argument("--width", type=int, default=1918, help="of the images, in pixels")


def _add_kernel_commands(commands: Commands) -> None:
    kernel = commands.add_parser("kernel", help="run a profile inside Kaggle's notebooks")
    kernel_commands = kernel.add_subparsers(required=True, metavar="build|push")
    build = _command(kernel_commands, "build", _kernel_build, "write a folder that `carvana kernel push` takes")
    build.add_argument("--profile", type=Path, default=Path("profiles/t4x2.yaml"), help="what runs there")
    build.add_argument("--folder", type=Path, default=Path("runs/kernel"), help="where it is written")
    build.add_argument("--user", default="", help="owner on Kaggle; default: that of the credentials")
    build.add_argument("--weights", type=Path, help="file of encoder weights, since there is no internet")
    build.add_argument("--python", default="3.12", help="version that Kaggle runs")
    build.add_argument("--no-wheels", action="store_true", help="trust that Kaggle has all requirements")
    push = _command(kernel_commands, "push", _kernel_push, "bring the folder to Kaggle and start the run there")
    push.add_argument("folder", type=Path, help="what `carvana kernel build` has written")
    push.add_argument("--resume", action="store_true", help="go on from the output of the last version")
    push.add_argument("--wait", action="store_true", help="follow it to its end and fetch its output; can be repeated")
    push.add_argument("--runs-dir", **RUNS_DIR)


def _command(commands: Commands, name: str, function: Action, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    command.set_defaults(run=function)
    return command
