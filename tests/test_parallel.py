"""What several processes say when one of them fails."""

import textwrap

import pytest

from carvana.errors import UserError
from carvana.parallel import Processes, launch


@pytest.mark.parametrize(("code", "message"), [
    ("raise ValueError('wheels are square')", "processes failed: .*ValueError: wheels are square"),
    ("print('carvana: fold 7 is missing', file=sys.stderr); sys.exit(1)", "^fold 7 is missing$"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "were killed, most likely for memory"),
])  # fmt: skip
def test_what_ended_a_process_reaches_the_user(tmp_path, monkeypatch, code, message):
    (tmp_path / "failing.py").write_text(textwrap.dedent(f"import os, signal, sys\n{code}\n"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        launch("failing", [], Processes(2))
