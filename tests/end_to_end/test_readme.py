"""Every command that the README shows, in its order, in a folder and a stack of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TINY = ROOT / "tests" / "end_to_end" / "tiny.yaml"

SMALLER = {
    "demo": ["--recipe", str(TINY), "--trials", "2", "--sweep-steps", "4", "--images", "16"],
    "train": ["--set", "steps=4", "--set", "name=cats"],
    "sweep": ["--trials", "2", "--steps", "2", "--grace-steps", "1"],
}
"""What makes a command fit into a test; nothing else of it is changed but `base`, which becomes the tiny recipe."""


def commands() -> list[str]:
    """The lines of the README's shell blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(pictures, folder / "pictures")
    yield folder
    run(folder, ["down"])


def run(place: Path, words: list[str], timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DARKROOM_HOME": str(place / ".darkroom"), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "cluster", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def smaller(words: list[str]) -> list[str]:
    words = [str(TINY) if word == "base" else word for word in words]
    return [*words, *SMALLER.get(words[0], [])]


@pytest.mark.timeout(900)
def test_the_readmes_commands_in_their_order(place: Path) -> None:
    shown = commands()
    assert shown, "the README shows no command"
    tried = []
    for line in shown:
        words = shlex.split(line)
        if words[0] == "make":
            targets = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{words[1]}:", targets, flags=re.MULTILINE), line
            if words[1] != "demo":
                continue  # `make test` is what runs this
            words = ["darkroom", "demo"]
        if words[0] == "curl":
            subprocess.run(shlex.split(line.replace("$API", api(place))), cwd=place, check=True, timeout=120)
            continue
        assert words[0] == "darkroom", f"the test does not know how to run: {line}"
        done = run(place, smaller(words[1:]), timeout_s=400)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        tried.append(words[1])
        if words[1:] == ["demo"]:
            check_the_demo(place, done.stdout)
    assert {"demo", "data", "train", "sweep", "models", "serve", "generate", "up", "status", "doctor"} <= set(tried)


def api(place: Path) -> str:
    state = json.loads((place / ".darkroom" / "stack.json").read_text())
    return f"http://127.0.0.1:{state['ports']['serve']}"


def check_the_demo(place: Path, told: str) -> None:
    """What the demo leaves behind; run again, it keeps every finished stage."""
    sheet = place / ".darkroom" / "demo" / "contact_sheet.png"
    assert str(sheet) in told
    for words in ("MLflow", "API", "curl", "darkroom down", "GiB", "memorised"):
        assert words in told, words
    with Image.open(sheet) as picture:
        assert picture.size[0] > 100
    assert httpx.get(f"{api(place)}/readyz", timeout=30).status_code == 200
    before = sheet.read_bytes()
    again = run(place, smaller(["demo", "--json"]), timeout_s=200)
    assert again.returncode == 0, again.stderr
    assert "run tiny is finished" in again.stderr
    assert json.loads(again.stdout)["model"] == "tiny/1"
    assert sheet.read_bytes() == before, "the same seeds and weights make the same pictures"
