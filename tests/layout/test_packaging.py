"""What pip installs is what was tested: every requirement has an upper bound, and the pinned
versions lie within the bounds. The package says who made it, for what."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
REQUIREMENTS = [
    requirement
    for texts in GROUPS.values()
    for requirement in map(Requirement, texts)
    if requirement.name != "pagewire"
]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(pin.name): pin for pin in found}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda one: one.name)
def test_a_requirement_has_bounds_around_the_version_that_was_tested(
    requirement: Requirement,
) -> None:
    assert {"<", ">="} <= {part.operator for part in requirement.specifier}
    pin = pins()[canonicalize_name(requirement.name)]
    versions = [part.version for part in pin.specifier if part.operator == "=="]
    assert all(requirement.specifier.contains(version) for version in versions)


def test_make_says_what_it_will_download_and_shows_how_far_pip_is(tmp_path: Path) -> None:
    for target in ("serve", "test"):
        command = ["make", "--dry-run", "--always-make", f"VENV={tmp_path}", target]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        lines = result.stdout.splitlines()
        (pip,) = (line for line in lines if "pip install" in line and " -e " in line)
        (size,) = (line for line in lines if "GB" in line)
        assert lines.index(size) < lines.index(pip) and size.lstrip().startswith("echo")
        assert "constraints.txt" in pip
        assert not {"-q", "--quiet", "--progress-bar", ">"} & set(pip.split())


def test_the_readme_has_the_line_for_pip_and_the_sizes() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install '.[all]'" in text and "constraints.txt" in text
    assert len(re.findall(r"[\d.]+ GB", text)) >= 4, "downloaded and on disk, with CUDA and without"


def test_the_package_says_who_made_it_and_for_what() -> None:
    assert PROJECT["authors"] == [{"name": "Pagewire developers"}]
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert (ROOT / PROJECT["readme"]).is_file() and PROJECT["description"]
    versions = [text for text in PROJECT["classifiers"] if text.startswith("Programming Language")]
    assert len(versions) >= 3
    # A licence expression and a licence classifier exclude each other.
    assert not [text for text in PROJECT["classifiers"] if text.startswith("License")]
