"""What is locked and what Kaggle brings fits what is required."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from carvana.files import project_root

ROOT = project_root()


def lines(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line.partition(" #")[0].strip() for line in text.splitlines() if line[:1] not in ("", "#")]


def needed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tests = [need for need in extras["test"] if need != "carvana[export]"] + extras["export"]
    return [*map(Requirement, lines("requirements.txt")), *map(Requirement, tests)]


def pinned(name):
    """Every pin of a file: the name and one version, with the marker where it holds."""
    return [Requirement(line.partition("--hash")[0].strip()) for line in lines(name)]


def version(pin):
    [only] = pin.specifier
    assert only.operator == "=="
    return Version(only.version)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", [("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows")])
def test_the_lock_has_one_version_that_fits_of_all_that_is_needed_everywhere(python, system):
    machine = {"python_version": python, "python_full_version": f"{python}.5"}
    machine |= {"sys_platform": system[0], "platform_system": system[1]}
    there = [pin for pin in pinned("requirements.lock") if not pin.marker or pin.marker.evaluate(machine)]
    for need in needed():
        [pin] = [pin for pin in there if pin.name == need.name.lower()]
        assert need.specifier.contains(version(pin)), need


def test_every_pin_has_hashes_and_nothing_names_a_host_or_a_build_of_one_machine():
    text = (ROOT / "requirements.lock").read_text()
    assert all("--hash=sha256:" in line for line in lines("requirements.lock"))
    assert not re.search(r"https?:|index-url|find-links|file:", text)
    assert not [pin for pin in pinned("requirements.lock") if version(pin).local]


def test_what_kaggle_brings_is_allowed():
    allowed = {need.name: need.specifier for need in needed()}
    assert not [str(pin) for pin in pinned("tests/constraints-kaggle.txt") if version(pin) not in allowed[pin.name]]
