"""A folder and tars of hostile files: each becomes what ``hostile.py`` says, and nothing else happens."""

import importlib.util
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from cluster.commands.data import app
from tests.training.data.ledgers import read_ledger
from training.data.build import build
from training.data.config import BuildConfig
from training.errors import DataError


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    """The generator, by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(hostile: ModuleType, folder: Path) -> dict[str, dict[str, str | None] | None]:
    found: dict[str, dict[str, str | None] | None] = hostile.write(folder)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "files"


def contents(folder: Path) -> dict[str, int]:
    return {os.fsencode(path).hex(): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_every_input_becomes_what_it_should(
    expected: dict[str, dict[str, str | None] | None], folder: Path, hostile: ModuleType, tmp_path: Path
) -> None:
    before = contents(folder)
    wrong = {}
    for source, rules in expected.items():
        out = tmp_path / source.replace("/", "-")
        if rules is None:
            with pytest.raises(DataError, match=r"not a readable tar|holds no pictures"):
                build(folder / source, out, BuildConfig(held_out=0))
            assert not out.exists()
            continue
        manifest = build(folder / source, out, BuildConfig(held_out=0))
        rows = list(read_ledger(out))
        found = {row.source: row.rule for row in rows}
        wrong |= {(source, name): rule for name, rule in found.items() if rules.get(name, "not expected") != rule}
        assert found.keys() == rules.keys()
        assert manifest.inputs == manifest.kept + sum(manifest.dropped.values()) == len(rows)
        assert all(hostile.FORBIDDEN not in path.read_bytes() for path in out.iterdir())
    assert wrong == {}
    assert contents(folder) == before
    assert not (tmp_path.parent / "climbs.png").exists()
    assert not (folder / "climbs.png").exists()


class Page(HTMLParser):
    """Notes what a page could load, run or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.policy = ""
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.handlers += [name] if name.startswith("on") or name == "style" else []
            self.links += [value or ""] if name in {"href", "action", "xlink:href"} else []
            self.sources += [value or ""] if name in {"src", "srcset", "data"} else []
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_its_report_loads_and_runs_nothing_and_shows_names_as_text(
    expected: dict[str, dict[str, str | None] | None], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    build(folder / "pictures", out, BuildConfig(held_out=0))
    result = CliRunner().invoke(app, ["report", str(out)])
    assert result.exit_code == 0, result.output
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert page.handlers == []
    assert all(link.startswith("#") for link in page.links)
    assert len(page.sources) > 30
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert page.policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "<img src=x onerror=alert(1)>.png" in page.text
    assert "{{ 7 * 7 }}.png" in page.text
    assert "\x1b" not in text
    for name, rule in (expected["pictures"] or {}).items():
        if rule is not None:
            assert name in page.text, f"{name} is not shown"
    again = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "again.html")])
    assert again.exit_code == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text
