"""The shape of the house: which package may import which, who may import Ray, and how long a file gets."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "training": {"training"},
    "serving": {"serving", "training"},
    "cluster": {"cluster", "serving", "training"},
}
"""cluster -> serving -> training, never the other way."""

RAY_OR_DEEPSPEED = {
    "training/data/distribute.py",
    "training/parallel.py",
    "training/parallel_collectives.py",
    "training/parallel_options.py",
    "training/parallel_state.py",
    "training/ray_agent.py",
    "training/ray_preemption.py",
    "training/ray_relay.py",
    "training/ray_resources.py",
    "training/ray_self_tests.py",
    "training/ray_train.py",
    "training/ray_tune.py",
    "training/worker.py",
    "serving/deployment.py",
    "serving/deployment_client.py",
    "serving/deployment_metrics.py",
}
"""The thin adapters; everything else runs without Ray. cluster/ may import Ray too, inside functions."""

HEAVY = {"torch", "ray", "deepspeed", "mlflow", "diffusers", "transformers"}

TOP_LEVEL = {"pyproject.toml", "README.md", "cluster", "training", "serving", "tests", "infra"}
ALSO_AT_THE_TOP = {"LICENSE", "Makefile", "requirements.lock", "NOTICE"}

MAX_LINES = 300

COPYLEFT = re.compile(r"(?<!L)(?<!Lesser )\bA?GPL|(Affero|(?<!Lesser )General) Public License", re.IGNORECASE)
"""The GPL and the AGPL. The LGPL lets others link to a package, and the MPL covers its own files only."""

SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names of all modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def imports_at_load(tree: ast.Module) -> Iterator[str]:
    """The same for what runs when the module is imported."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        pending.extend(ast.iter_child_nodes(node))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_source_file_keeps_to_its_place(path: Path) -> None:
    package = name(path).partition("/")[0]
    text = path.read_text()
    tree = ast.parse(text)
    used = set(imports(tree))
    assert not (used & set(MAY_IMPORT)) - MAY_IMPORT[package], "imports against the direction"
    assert "tests" not in used
    if package == "cluster":
        assert not set(imports_at_load(tree)) & HEAVY, "imported when `darkroom --help` runs"
    elif name(path) not in RAY_OR_DEEPSPEED:
        assert not used & {"ray", "deepspeed"}, "only the adapters import Ray or DeepSpeed"
    assert text.count("\n") <= MAX_LINES, f"{text.count(chr(10))} lines"


def test_the_top_level_is_as_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {entry for entry in top if not entry.startswith(".")} - ALSO_AT_THE_TOP <= TOP_LEVEL


def test_the_lock_is_complete_and_names_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and not {"+", "/", "@", "-i"} & set(line) for line in pins)
    assert "torch==2.13.0" in pins, "without a build, so that a machine with GPUs gets the CUDA build"


def licence(package: importlib.metadata.Distribution) -> str:
    """All that a package's metadata says of its licence; a whole text is left to its first line."""
    told = package.metadata
    stated = [told.get("License-Expression", ""), *told.get("License", "").strip().splitlines()[:1]]
    return " | ".join([*stated, *(line for line in told.get_all("Classifier", []) if line.startswith("License"))])


def test_nothing_that_is_installed_is_under_the_gpl() -> None:
    found = {package.name: licence(package) for package in importlib.metadata.distributions()}
    assert len(found) > 100
    assert {name: said for name, said in found.items() if COPYLEFT.search(said)} == {}


@pytest.mark.parametrize(
    "text",
    ["GPLv2", "GPL-3.0-or-later", "AGPL-3.0", "License :: OSI Approved :: GNU General Public License v2 (GPLv2)"],
)
def test_the_gpl_is_known_by_its_names(text: str) -> None:
    assert COPYLEFT.search(text)


@pytest.mark.parametrize(
    "text", ["LGPL-2.1", "MIT", "MPL-2.0", "License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)"]
)
def test_other_licences_are_not_taken_for_it(text: str) -> None:
    assert not COPYLEFT.search(text)


def test_the_readme_asks_for_the_memory_that_doctor_looks_for() -> None:
    from cluster.doctor import MEMORY_GIB

    assert f"{MEMORY_GIB} GiB of memory" in (ROOT / "README.md").read_text()
