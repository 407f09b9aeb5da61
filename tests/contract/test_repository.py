"""What the repository promises its contributors: short functions, errors in one place, the same checks everywhere."""

import ast
import os
import re
import stat
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "leanvocab"

METADATA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def parsed_modules():
    return {path.relative_to(SOURCE): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def own_files():
    """Files of the repository, without what git ignores and without binaries."""
    skipped = {".git", ".venv", ".cache", "demo-output", "build", "dist"}
    for path in sorted(REPOSITORY.rglob("*")):
        parts = path.relative_to(REPOSITORY).parts
        ignored = any(part in skipped or part.endswith(("_cache", "__pycache__", ".egg-info")) for part in parts)
        if path.is_file() and not ignored and parts[0] != ".hypothesis":
            yield path


# --- the source -------------------------------------------------------------------------------------------------------


def test_nine_functions_in_ten_are_under_forty_lines():
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path}: {node.name}")
        for path, tree in parsed_modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = sorted((found for found in functions if found[0] >= 40), reverse=True)
    assert len(long) <= len(functions) / 10, long


def test_every_error_is_defined_in_one_place():
    elsewhere = [
        f"{path}: {node.name}"
        for path, tree in parsed_modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and path != Path("errors.py")
        # What has a leading underscore is caught in the room that raises it.
        and node.name.endswith(("Error", "Warning"))
        and not node.name.startswith("_")
    ]
    assert elsewhere == []


def test_the_tree_at_the_top_of_the_errors_names_every_error():
    errors = parsed_modules()[Path("errors.py")]
    defined = [node.name for node in errors.body if isinstance(node, ast.ClassDef)]
    assert (
        re.findall(r"\b\w+(?:Error|Warning)\b(?= \(|  +)|^LeanVocabError", ast.get_docstring(errors), re.M) == defined
    )


def test_every_module_says_what_it_is():
    assert [str(path) for path, tree in parsed_modules().items() if not ast.get_docstring(tree)] == []


def test_no_file_names_a_folder_of_someones_machine():
    pattern = re.compile(rb"(?<![\w.])/(?:work|home|root|Users)/\w")
    found = {
        f"{path.relative_to(REPOSITORY)}: {line.strip()[:80]!r}"
        for path in own_files()
        for line in path.read_bytes().splitlines()
        if pattern.search(line)
    }
    assert found == set()


# --- the checks -------------------------------------------------------------------------------------------------------


def test_a_warning_fails_a_test():
    assert METADATA["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"
    with pytest.raises(UserWarning, match="as an error"):
        warnings.warn("as an error", stacklevel=1)


def test_every_direct_dependency_is_pinned_for_development():
    project = METADATA["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        re.match(r"[\w-]+", line)[0] for line in [*project["dependencies"], *(x for extra in extras for x in extra)]
    }
    wanted |= set(re.findall(r"^([\w-]+)", (REPOSITORY / "doors" / "requirements.txt").read_text(), re.M))
    pins = re.findall(r"^([\w-]+)==[\w.]+$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert sorted(pins) == sorted(wanted - {"leanvocab"})


def test_the_package_itself_asks_for_versions_from_which_on_it_works():
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", line) for line in METADATA["project"]["dependencies"])


def test_the_readme_of_the_package_has_no_link_that_an_index_cannot_follow():
    hook = METADATA["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join(each.get("text") or (REPOSITORY / each["path"]).read_text() for each in hook["fragments"])
    assert re.findall(r"\]\((?!https?://)", text), "links of the README itself are relative"
    for each in hook["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    assert re.findall(r"\]\((?!https?://).*", text) == []
    assert "language models · QLoRA" in re.sub(r"\s+", " ", text)  # the words of a link stay
    assert all(url.startswith("https://") for url in METADATA["project"]["urls"].values())


def test_what_the_readme_links_to_is_in_the_source_archive():
    """The pages have no address yet: whoever has the archive has them. (They exist: tests/contract/test_docs.py.)"""
    included = METADATA["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    links = re.findall(r"\]\(([^)#\s]+)", (REPOSITORY / "README.md").read_text())
    relative = [link for link in links if not link.startswith(("https://", "mailto:"))]
    assert relative
    assert [
        link for link in relative if not any(f"/{link}" == at or f"/{link}".startswith(f"{at}/") for at in included)
    ] == []


def with_fake(tmp_path, name, script):
    """An environment whose PATH starts with a fake command."""
    fake = tmp_path / "bin" / name
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(script)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}


def ci_run(environment):
    return subprocess.run([REPOSITORY / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)


def test_ci_runs_make_test_and_ends_with_its_output(tmp_path):
    done = ci_run(with_fake(tmp_path, "make", '#!/bin/sh\necho "$@"\necho "===== 3 passed in 1.00s ====="\n'))
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["--no-print-directory test", "===== 3 passed in 1.00s ====="]


def test_ci_fails_when_a_test_fails_and_pytests_closing_line_is_still_the_last(tmp_path):
    script = '#!/bin/sh\necho "===== 1 failed, 2 passed in 1.00s ====="\necho "make: *** [test] Error 1" >&2\nexit 2\n'
    done = ci_run(with_fake(tmp_path, "make", script))
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "===== 1 failed, 2 passed in 1.00s ====="


def test_ci_fails_when_nothing_could_be_installed(tmp_path):
    done = ci_run(with_fake(tmp_path, "make", "#!/bin/sh\nexit 2\n"))
    assert done.returncode == 2


def test_an_older_python_is_named_before_anything_is_installed(tmp_path):
    (tmp_path / "Makefile").write_bytes((REPOSITORY / "Makefile").read_bytes())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = (
        f'#!/bin/sh\nexec {sys.executable} -c "import sys, types; '
        'sys.version_info = type(\'V\', (tuple,), dict(major=3, minor=9))((3, 9)); exec(sys.argv[1])" "$2"\n'
    )
    environment = with_fake(tmp_path, "python3.9", old)
    run = ["make", "-C", str(tmp_path), "install", "PYTHON=python3.9"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "leanvocab needs Python 3.11 or later; python3.9 is 3.9" in done.stderr
    assert not (tmp_path / ".venv").exists()


DOORS = (
    "adapters/beside_lora",
    "adapters/exporting",
    "adapters/lora",
    "checkpoints/training_runs",
    "output/trl_losses",
    "partial/sharded",
    "trainers/callback",
    "trainers/resuming",
    "vocabulary/ray_data",
)


@pytest.mark.parametrize("door", DOORS)
def test_a_door_to_another_library_stays_small(repository: Path, door: str) -> None:
    lines = (repository / "src/leanvocab" / f"{door}.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 120
