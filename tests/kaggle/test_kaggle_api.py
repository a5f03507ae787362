import base64
import builtins
import errno
import json
import socket
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from fake_kaggle import KEY, USER, hide_credentials, refused

from carvana.kaggle import client, credentials, download


def test_the_net_holds(fake):
    with pytest.raises(AssertionError, match="tried to reach api.kaggle.com"):
        socket.create_connection(("api.kaggle.com", 443), timeout=1)
    with pytest.raises(AssertionError, match="tried to reach"):
        socket.socket().connect(("192.0.2.1", 443))
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get("https://api.kaggle.com", timeout=1)
    endpoint = client.sign_in().build_kaggle_client().http_client()._endpoint
    assert endpoint == f"http://127.0.0.1:{fake.port}"


def test_no_credentials(monkeypatch, tmp_path):
    home = hide_credentials(monkeypatch, tmp_path)
    refused("No Kaggle credentials.*access_token", download.download, tmp_path)
    (home / ".kaggle" / "kaggle.json").write_text((Path(__file__).parents[2] / "kaggle.json.example").read_text())
    refused("still holds the example", client.credentials_source)
    (home / ".kaggle" / "kaggle.json").write_text('{"username": "a"}')
    refused("must hold username and key", client.credentials_source)
    (home / ".kaggle" / "kaggle.json").write_text("{broken")
    refused("kaggle.json cannot be read as JSON", client.credentials_source)


def test_where_credentials_come_from(monkeypatch, tmp_path):
    folder = hide_credentials(monkeypatch, tmp_path) / ".kaggle"
    (folder / "credentials.json").write_text("{}")
    assert client.credentials_source() == str(folder / "credentials.json")
    (folder / "kaggle.json").write_text(json.dumps({"username": "a", "key": KEY}))
    assert client.credentials_source() == str(folder / "kaggle.json")
    monkeypatch.setenv("KAGGLE_USERNAME", "b")
    refused("KAGGLE_USERNAME is not the user", client.credentials_source)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert "KAGGLE_USERNAME and KAGGLE_KEY" in client.credentials_source()
    (folder / "access_token").write_text(KEY)
    assert client.credentials_source() == str(folder / "access_token")
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    assert "KAGGLE_API_TOKEN" in client.credentials_source()


def test_key_file_is_read_anew_in_the_same_process(fake, monkeypatch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "kaggle.json").write_text(json.dumps({"username": "carol", "key": "x1"}))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(folder))
    assert client.sign_in().config_values["username"] == "carol"


def test_a_key_that_others_can_read_is_warned_of_without_being_shown(fake, monkeypatch, tmp_path, capfd):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "home" / ".kaggle" / "kaggle.json"
    path.write_text(json.dumps({"username": "carol", "key": "k-1"}))
    path.chmod(0o644)
    client.sign_in()
    assert capfd.readouterr().out == f"Warning: others on this machine can read {path}. Close it: chmod 600 {path}\n"
    client.sign_in()
    assert capfd.readouterr().out == ""  # once is enough
    path.chmod(0o600)
    credentials.warn_if_open.cache_clear()
    client.sign_in()
    assert capfd.readouterr().out == ""


def test_a_home_that_may_not_be_looked_into_holds_no_credentials(monkeypatch, tmp_path):
    def forbidden(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    hide_credentials(monkeypatch, tmp_path)
    with monkeypatch.context() as patched:
        for name in ("is_file", "exists", "read_text"):
            patched.setattr(Path, name, forbidden)
        refused("No Kaggle credentials", credentials.credentials_source)


def test_a_token_that_kaggle_does_not_take(fake, monkeypatch):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    download.list_files(client.sign_in())
    for status in ("403", "401"):  # the client tells them apart, a user need not
        fake.faults["IntrospectToken"] = [status] * 2
        refused("refused the credentials of the environment variable KAGGLE_API_TOKEN", client.sign_in)
        with monkeypatch.context() as jupyter:
            jupyter.delattr(builtins, "exit")
            refused("refused the credentials of the environment variable KAGGLE_API_TOKEN", client.sign_in)
    monkeypatch.setattr(client, "TIMEOUT", (1, 0.1))
    fake.faults["IntrospectToken"] = ["stall"]
    refused("Signing in: the line to Kaggle fails", client.sign_in)


def test_a_client_that_cannot_be_imported(fake, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "six", None)
    refused("Package kaggle does not work .*six.*requirements.txt", client.sign_in)


def test_the_client_is_quiet_and_time_outs_do_not_stay(fake, capfd):
    send = requests.adapters.HTTPAdapter.send
    download.list_files(client.sign_in())
    assert capfd.readouterr() == ("", "")
    assert requests.adapters.HTTPAdapter.send is send


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n\n"])
@pytest.mark.parametrize("place", ["KAGGLE_API_TOKEN", "access_token", "KAGGLE_KEY"])
def test_a_line_break_behind_a_secret_does_no_harm(fake, monkeypatch, tmp_path, place, end):
    if place == "access_token":
        (tmp_path / "home" / ".kaggle" / "access_token").write_bytes((KEY + end).encode())
    else:
        monkeypatch.setenv(place, KEY + end)
    assert len(download.list_files(client.sign_in())) == len(fake.files)
    (tmp_path / "home" / ".kaggle" / "access_token").unlink(missing_ok=True)  # that no file holds it is checked


@pytest.mark.parametrize("inside", ["\n", "\r\n", " ", "\x1b[1m", "\u00e9"])
@pytest.mark.parametrize("place", ["KAGGLE_API_TOKEN", "access_token", "KAGGLE_KEY", "my token"])
def test_a_secret_of_two_lines_is_refused_and_not_shown(fake, monkeypatch, tmp_path, place, inside):
    path = tmp_path / "home" / ".kaggle" / place
    if "token" in place:
        monkeypatch.setenv("KAGGLE_API_TOKEN", str(path) if place == "my token" else "")
        path.write_bytes((KEY + inside + KEY[::-1]).encode())
    else:
        monkeypatch.setenv(place, KEY + inside + KEY[::-1])
    told = refused(f"{place}.*a line break or a foreign character is inside. Copy it", download.download, tmp_path)
    assert KEY[::-1] not in told
    assert fake.requests == []
    path.unlink(missing_ok=True)


def basic(user, key):
    return base64.b64encode(f"{user}:{key}".encode()).decode()


def test_what_a_server_says_is_shown_without_secrets_addresses_and_control_codes(fake, tmp_path):
    secrets = [KEY, "token-of-oauth", "token/of-the-file"]
    (tmp_path / "home" / ".kaggle" / "credentials.json").write_text(json.dumps({"refresh_token": secrets[1]}))
    (tmp_path / "home" / ".kaggle" / "access_token.txt").write_text(f"{secrets[2]}\n")
    for secret in secrets:
        for shown in (secret, quote(secret, safe=""), basic(USER, secret), base64.b64encode(secret.encode()).decode()):
            said = (
                f"\x1b[31mno\x1b[0m {shown}\r\n\x1b]0;title\x07 at https://x.test/a?Signature=s3&b=1 \0Bearer abc.def"
            )
            assert client.scrub(said) == "no *** at https://x.test/a?... Bearer ***"


def test_names_that_a_server_lists_carry_no_control_codes(fake):
    fake.files = {"train\x1b[2J\x1b]0;x\x07.zip": b""}
    assert download.list_files(client.sign_in()) == {"train.zip": 0}
