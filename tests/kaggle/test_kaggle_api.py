import json
import socket
import sys
from pathlib import Path

import pytest
import requests
from fake_kaggle import KEY, hide_credentials, refused

from carvana.kaggle import client, download


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
    refused("No Kaggle credentials.*kaggle.json.example", download.download, tmp_path)
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
    path.chmod(0o600)
    client.sign_in()
    assert capfd.readouterr().out == ""


def test_a_token_that_kaggle_does_not_take(fake, monkeypatch):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
    download.list_files(client.sign_in())
    for status in ("403", "401"):  # the client tells them apart, a user need not
        fake.faults["IntrospectToken"] = [status]
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
