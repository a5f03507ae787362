"""What several processes say when one of them fails."""

import subprocess
import sys

import pytest

from carvana.errors import UserError
from carvana.parallel import Processes, launch

FAILING = """\
import os, signal, sys
from carvana.errors import UserError
from carvana.parallel import exit_code

def open_file(name):
    raise UserError(f"{name} is missing")

"""


@pytest.mark.parametrize(("code", "message"), [
    ("raise ValueError('wheels are square')", "processes failed: .*ValueError: wheels are square"),
    ("sys.exit(exit_code(lambda: open_file('fold 7')))", "^fold 7 is missing$"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "were killed, most likely for memory"),
])  # fmt: skip
def test_what_ended_a_process_reaches_the_user(tmp_path, monkeypatch, code, message):
    (tmp_path / "failing.py").write_text(FAILING + code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        launch("failing", [], Processes(2))


@pytest.mark.parametrize(("lasts", "launcher_ends"), [(60, True), (0, False)])
def test_a_launched_process_ends_with_the_one_that_launched_it(lasts, launcher_ends):
    code = f"import sys, time; from carvana.parallel import exit_code; sys.exit(exit_code(lambda: time.sleep({lasts})))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as launched:
        if launcher_ends:  # however: the system closes its end of the pipe
            launched.stdin.close()
        assert launched.wait(timeout=30) == launcher_ends
