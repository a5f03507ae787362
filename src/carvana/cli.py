"""The command line: `carvana ...`, the same as `python -m carvana ...`."""

import argparse
import sys
from pathlib import Path

from carvana.files import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when it did its work, 1 with one line on standard error when not."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
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
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _run(options: argparse.Namespace) -> None:
    from carvana import pipeline

    print("\n".join(pipeline.run(options.profile, dict(options.parameter))))


def _params(options: argparse.Namespace) -> None:
    from carvana import pipeline

    for name, parameter in sorted(pipeline.parameters().items()):
        notebooks = " ".join(notebook[:2] for notebook in parameter.notebooks)
        print(f"{name:18}{parameter.default!r:24}{notebooks:20}{parameter.help}")


def _demo_data(options: argparse.Namespace) -> None:
    from carvana.data import demo

    demo.write_competition(options.folder, options.cars, options.test_cars, options.seed)
    print(f"{options.folder} holds the demo competition: {options.cars} cars to train on, {options.test_cars} to test.")


def _download(options: argparse.Namespace) -> None:
    from carvana.kaggle import download as transfer

    transfer.download(options.data_dir, options.files, options.hq)


def _compare(options: argparse.Namespace) -> None:
    from carvana.evaluation import evaluate as evaluation
    from carvana.files import resolve

    runs = [resolve(options.runs_dir) / run for run in options.runs]
    print(evaluation.compare(runs).to_string(index=False, float_format="{:.6f}".format))


def _validate(options: argparse.Namespace) -> int:
    from carvana import submission

    found = submission.validate(options.file, options.sample, options.height, options.width)
    print("\n".join(found.lines()))
    return 0 if found.ok else 1


def _score(options: argparse.Namespace) -> None:
    from carvana import submission
    from carvana.files import write_text

    scores = submission.score(options.file, options.truth)
    if options.csv:
        write_text(options.csv, scores.to_csv(index=False))
    print(f"Dice {scores['dice'].mean():.6f}  IoU {scores['iou'].mean():.6f}  {len(scores)} pictures")


def _submit(options: argparse.Namespace) -> None:
    from carvana.kaggle import submit as entry

    run = options.run_name or options.file.name.partition(".")[0]
    entry.submit(
        options.file, options.message, options.sample, options.submissions_dir, run, options.yes,
        options.height, options.width,
    )  # fmt: skip


def _kernel_build(options: argparse.Namespace) -> None:
    from carvana.kaggle import client as kaggle_api
    from carvana.kaggle import kernels

    user = options.user or kaggle_api.username()
    kernels.build(options.profile, options.folder, user, options.weights, options.python, not options.no_wheels)
    size = sum(path.stat().st_size for path in (options.folder / "dataset").iterdir()) / 1e6
    print(f"{options.folder} is ready, {size:.0f} MB. Next: carvana kernel push {options.folder}")


def _kernel_push(options: argparse.Namespace) -> None:
    from carvana.kaggle import kernels

    kernel = kernels.push(options.folder, options.resume)
    name = kernel.rpartition("/")[0]
    print(f"{kernel} runs on Kaggle. Follow it, then fetch its files, with:")
    print(f"  kaggle kernels status {name}\n  kaggle kernels logs {name}\n  kaggle kernels output {name} -p output")


def _ledger(options: argparse.Namespace) -> None:
    from carvana.files import resolve
    from carvana.kaggle import ledger
    from carvana.kaggle import submit as entry

    submissions_dir = resolve(options.submissions_dir)
    if not options.offline and ledger.rows(submissions_dir / "ledger.csv"):
        entry.refresh(submissions_dir)
    table = ledger.beside_runs(submissions_dir, resolve(options.runs_dir))
    print(
        table.to_string(index=False, float_format="{:.6f}".format, na_rep="-") if len(table) else "No submission yet."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("carvana", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "run the notebooks with a profile")
    run.add_argument("profile", type=Path, help="a YAML file of parameters, such as profiles/demo.yaml")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))

    _command(commands, "params", _params, "list the parameters of all notebooks")

    data = _command(commands, "demo-data", _demo_data, "write the built-in demo competition")
    data.add_argument("folder", type=Path)
    data.add_argument("--cars", type=int, default=12, help="cars to train on, 16 pictures each")
    data.add_argument("--test-cars", type=int, default=4)
    data.add_argument("--seed", type=int, default=1)

    download = _command(commands, "download", _download, "fetch the competition's files from Kaggle")
    download.add_argument("--data-dir", type=Path, default=Path("data/carvana"))
    download.add_argument("--files", nargs="+", help="names on Kaggle; default: what training and prediction need")
    download.add_argument("--hq", action="store_true", help="the _hq photographs instead of the usual ones")

    compare = _command(commands, "compare", _compare, "compare the out-of-fold Dice of runs, picture by picture")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of all runs")

    validate = _command(commands, "validate", _validate, "check a submission file")
    validate.add_argument("file", type=Path)
    _sample_and_size(validate)

    score = _command(commands, "score", _score, "score a submission against true masks")
    score.add_argument("file", type=Path)
    score.add_argument("--truth", type=Path, required=True, help="csv of img,rle_mask")
    score.add_argument("--csv", type=Path, help="write a row per picture to this file")

    submit = _command(commands, "submit", _submit, "validate, upload and wait for the score")
    submit.add_argument("file", type=Path)
    submit.add_argument("-m", "--message", required=True)
    submit.add_argument("--yes", action="store_true", help="do not ask")
    submit.add_argument("--submissions-dir", type=Path, default=Path("submissions"), help="folder of ledger.csv")
    submit.add_argument("--run-name", default="", help="that made the file; default: the file's own name")
    _sample_and_size(submit)

    kernel = commands.add_parser("kernel", help="run a profile inside Kaggle's notebooks")
    kernel = kernel.add_subparsers(required=True, metavar="build|push")
    build = _command(kernel, "build", _kernel_build, "write a folder that `carvana kernel push` takes")
    build.add_argument("--profile", type=Path, default=Path("profiles/t4x2.yaml"), help="what runs there")
    build.add_argument("--folder", type=Path, default=Path("runs/kernel"), help="where it is written")
    build.add_argument("--user", default="", help="owner on Kaggle; default: that of the credentials")
    build.add_argument("--weights", type=Path, default="", help="file of encoder weights, since there is no internet")
    build.add_argument("--python", default="3.12", help="version that Kaggle runs")
    build.add_argument("--no-wheels", action="store_true", help="trust that Kaggle has all requirements")
    push = _command(kernel, "push", _kernel_push, "bring the folder to Kaggle and start the run there")
    push.add_argument("folder", type=Path)
    push.add_argument("--resume", action="store_true", help="go on from the output of the last version")

    ledger = _command(commands, "ledger", _ledger, "list submissions with their scores, refreshed from Kaggle")
    ledger.add_argument("--submissions-dir", type=Path, default=Path("submissions"), help="folder of ledger.csv")
    ledger.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of all runs")
    ledger.add_argument("--offline", action="store_true", help="do not ask Kaggle")
    return parser


def _command(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    command.set_defaults(run=function)
    return command


def _sample_and_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sample", type=Path, required=True, help="sample_submission.csv, also zipped")
    command.add_argument("--height", type=int, default=1280, help="of the pictures, in pixels")
    command.add_argument("--width", type=int, default=1918, help="of the pictures, in pixels")
