"""The page at ``/`` in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig
from serving.engine import Engine
from serving.model import ModelCard
from tests.serving.browser import CHROMIUM, Page
from tests.serving.live_server import serving
from training.canvas import Canvas
from training.objectives import Denoiser

CARD = ModelCard("tiny", 3, resolution=8, created=1_700_000_000, bundle_sha256="b" * 64)
CTRL = 2
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def engine(denoiser: Denoiser, encoder: Any) -> Engine:
    batch = BatchConfig(padded_rows=2, max_batch_rows=4, max_waiting_images=8)
    return Engine(denoiser, encoder, canvas=Canvas(8), config=batch)


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    app = create_app(engine, CARD, LimitConfig(max_steps=1_000_000, max_prompt_characters=200))
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def opened(tmp_path: Path, url: str) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def open_page(**options: Any) -> Page:
        pages.append(Page(tmp_path / f"browser-{len(pages)}", f"{url}/", **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.__exit__(None, None, None)


def test_the_page_needs_nothing_from_elsewhere_and_may_run_nothing_else(url: str) -> None:
    page = httpx.get(f"{url}/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("", "web/app.js", "web/style.css"):
        text = httpx.get(f"{url}/{name}").text
        assert "://" not in text
        assert " on" + "click=" not in text
    assert httpx.get(f"{url}/web/../app.py").status_code == 404


@browser
def test_a_prompt_and_ctrl_enter_make_pictures_with_previews_on_the_way(
    opened: Callable[..., Page], tmp_path: Path
) -> None:
    page = opened()
    page.until("document.querySelector('#model').textContent.includes('tiny, version 3')")
    page("Runtime.evaluate", expression="""
        window.seen = 0;
        new MutationObserver(() => seen += document.querySelectorAll('figure.making img[src]').length > 0)
            .observe(document.querySelector('#gallery'), {subtree: true, attributes: true, attributeFilter: ['src']});
    """)  # fmt: skip
    page.type("a red circle")
    page.value("document.querySelector('#n').value = 2")
    page.value("document.querySelector('#seed').value = 7")
    page.press("Enter", 13, CTRL)
    page.until("document.querySelector('#status').textContent.startsWith('Done')")
    captions = page.value("[...document.querySelectorAll('figcaption')].map(each => each.textContent)")
    assert captions == ["seed 7 save use seed", "seed 8 save use seed"]
    assert page.value("[...document.images].every(each => each.naturalWidth === 8 && each.alt === 'a red circle')")
    assert page.value("seen") >= 2
    assert page.value("document.querySelector('a[download]').download") == "darkroom-7.png"
    page.screenshot(tmp_path / "page.png")
    assert page.errors == []


@browser
def test_escape_stops_and_frees_the_rows_and_a_refusal_is_shown(opened: Callable[..., Page], engine: Engine) -> None:
    page = opened()
    page.type("long")
    page.value("document.querySelector('#steps').value = 500000")
    page.press("Enter", 13, CTRL)
    page.until("document.querySelector('#status').textContent === 'Denoising…'")
    assert engine.running_images == 1
    page.press("Escape", 27)
    page.until("document.querySelector('#status').textContent === 'Stopped.'")
    deadline = time.monotonic() + 20
    while engine.running_images:
        assert time.monotonic() < deadline
    assert page.value("document.querySelectorAll('figure').length") == 0
    page.value("document.querySelector('#steps').value = 3")
    page.type(" word" * 30)
    page.press("Enter", 13, CTRL)
    page.until("document.querySelector('#status').classList.contains('bad')")
    assert "prompt <= 12 tokens" in page.value("document.querySelector('#status').textContent")


@browser
def test_the_shown_programs_ask_for_the_same_picture(opened: Callable[..., Page], url: str) -> None:
    page = opened()
    page.type('it\'s a "cat"')
    page.value("document.querySelector('#seed').value = 5")
    page.value("document.querySelector('#tab-python').click()")
    code = page.value("document.querySelector('#code').textContent")
    assert f'base_url="{url}/v1"' in code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})  # noqa: S102 - it is what the page tells its users to run
    assert printed.getvalue() == "5\n"


@browser
def test_a_prompt_that_begins_like_a_file_stays_text_in_the_shown_curl(
    opened: Callable[..., Page], tmp_path: Path
) -> None:
    page = opened()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "picture.png")
    (tmp_path / "secret").write_text("word " * 30)
    page.type("@secret;type=text/plain")
    page.choose("#image", tmp_path / "picture.png")
    code = page.value("document.querySelector('#code').textContent")
    assert "v1/images/edits" in code
    found = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    image = Image.open(io.BytesIO(base64.b64decode(json.loads(found.stdout)["data"][0]["b64_json"])))
    assert json.loads(image.info["darkroom"])["prompt"] == "@secret;type=text/plain"


@browser
def test_a_prompt_is_text_and_never_markup(opened: Callable[..., Page]) -> None:
    page = opened()
    page.type('<img src=x onerror="window.bad = 1"><b>bold</b>')
    page.press("Enter", 13, CTRL)
    page.until("document.querySelector('#status').textContent.startsWith('Done')")
    assert page.value("window.bad === undefined && document.querySelectorAll('main b, img[src=x]').length === 0")
    assert page.value("[...document.querySelectorAll('[role=tablist] > *')].every(each => each.role === 'tab')")
    assert page.errors == []


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(opened: Callable[..., Page], dark: bool) -> None:
    page = opened(size=(380, 800), dark=dark)
    page.value("document.querySelector('details').open = true")
    assert page.value("document.documentElement.scrollWidth") <= 380
    unnamed = "[...document.querySelectorAll('input, textarea, select')].filter(each => !each.labels.length).length"
    assert page.value(unnamed) == 0
