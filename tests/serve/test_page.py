"""The web page in a real browser, against the service on Ray Serve."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import Service, World, draw

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright  # noqa: E402

pytestmark = pytest.mark.slow

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))),
    None,
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    url = service("together").url
    context = browser.new_context(viewport={"width": 1100, "height": 900}, base_url=url)
    page = context.new_page()
    expect.set_options(timeout=15_000)  # a busy machine
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: None if _own(request.url, url) else problems.append(request.url))
    page.goto("/")
    yield page
    context.close()
    # No script error, no blocked content, no dialog, no request elsewhere. A 4xx that the test provoked
    # is logged by the browser, too.
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


def _own(requested: str, url: str) -> bool:
    return requested.startswith((url, "blob:", "data:"))


def results_are_there(page: Page, count: int) -> None:
    tiles = page.locator("#results .tile")
    expect(tiles).to_have_count(count)
    expect(page.locator("#results")).not_to_have_class(re.compile("busy"))
    images = tiles.locator("img").all()
    for image in images:
        image.scroll_into_view_if_needed()  # pictures load lazily
    # Not wait_for_function: that evaluates in the page, which the page's policy forbids.
    deadline = time.monotonic() + 15
    while not all(image.evaluate("each => each.complete && each.naturalWidth > 0") for image in images):
        assert time.monotonic() < deadline, "pictures do not load"
        time.sleep(0.05)
    assert len(images) == count


def screenshot_is_no_blank(page: Page, path: Path) -> None:
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    assert pixels.std() > 20
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


def test_words_give_pictures(page: Page, world: World, tmp_path: Path) -> None:
    expect(page.locator("#about")).to_contain_text("60 items")
    page.get_by_label("What to look for, in words").fill("red star")
    page.get_by_role("button", name="Search", exact=True).click()
    results_are_there(page, 10)
    expect(page.locator("#status")).to_contain_text("10 results")
    expect(page.locator("#timings")).to_contain_text("embed")
    expect(page.locator("#digest")).to_have_text(str(world.model.digest)[:12])
    captions = {row["text"] for row in world.rows}
    # Captions with markup are shown as they are, and never run.
    assert set(page.locator(".caption").all_text_contents()) <= captions
    assert page.locator("#results b").count() == 0
    assert "q=red+star" in page.url
    page.locator("#k").select_option("50")
    results_are_there(page, 50)
    assert any("<b onclick" in text for text in page.locator(".caption").all_text_contents())
    page.locator("#k").select_option("10")
    results_are_there(page, 10)
    screenshot_is_no_blank(page, tmp_path / "light.png")


def test_a_picture_finds_itself(page: Page, world: World, tmp_path: Path) -> None:
    (tmp_path / "query.png").write_bytes(world.images[30])
    page.set_input_files("#file", tmp_path / "query.png")
    results_are_there(page, 10)
    expect(page.locator(".score").first).to_have_text("1.000")
    expect(page.locator("#thumb")).to_be_visible()
    expect(page.locator(".caption").first).to_have_text(world.rows[30]["text"])
    screenshot_is_no_blank(page, tmp_path / "picture.png")
    page.get_by_role("button", name=re.compile("^Similar to")).nth(1).click()
    expect(page.locator(".score").first).to_have_text("1.000")
    page.get_by_role("button", name="Remove picture").click()
    expect(page.locator("#preview")).to_be_hidden()


def test_a_dropped_picture_is_searched(page: Page, tmp_path: Path) -> None:
    import base64

    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
            for (const type of ['dragenter', 'dragover', 'drop'])
                document.body.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true}));
        }""",
        base64.b64encode(draw("green", "square", 70)).decode(),
    )
    results_are_there(page, 10)
    expect(page.locator("#filename")).to_have_text("dropped.png")
    expect(page.locator("body")).not_to_have_class(re.compile("dragging"))


def test_filters_narrow_by_type(page: Page) -> None:
    page.locator("#text").fill("something")
    page.locator("#column").select_option("size")
    page.locator("#value").fill("88")
    page.locator("#value").press("Enter")
    results_are_there(page, 10)
    assert all("size: 88" in text for text in page.locator(".facts").all_text_contents())
    page.locator("#column").select_option("shape")
    page.locator("#value").fill("dodecahedron")
    page.locator("#value").press("Enter")
    expect(page.locator("#status")).to_contain_text("Nothing found")


def test_errors_are_shown(page: Page, tmp_path: Path) -> None:
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Type some words or choose a picture first.")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    expect(page.get_by_role("alert")).to_contain_text("image: not an image")
    page.get_by_role("button", name="Remove picture").click()
    page.locator("#text").fill("star")
    page.locator("#column").select_option("size")
    page.locator("#value").fill("large")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("filter.size")
    expect(page.locator(".tile")).to_have_count(0)


def test_the_address_holds_the_query(page: Page) -> None:
    page.goto("/?q=blue%20circle&k=5&filter=colour&is=blue")
    results_are_there(page, 5)
    expect(page.locator("#text")).to_have_value("blue circle")
    expect(page.locator("#value")).to_have_value("blue")
    page.locator("#text").fill("green")
    page.locator("#text").press("Enter")
    expect(page).to_have_url(re.compile("q=green"))
    page.go_back()
    expect(page.locator("#text")).to_have_value("blue circle")
    results_are_there(page, 5)


def test_words_typed_while_the_page_still_loads_stay(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/index", lambda route: held.append(route))
    page.goto("/")
    page.locator("#text").fill("early words")
    expect(page.locator("#about")).not_to_contain_text("60 items")
    held[0].continue_()
    expect(page.locator("#about")).to_contain_text("60 items")
    expect(page.locator("#text")).to_have_value("early words")


def test_dark_and_narrow(page: Page, tmp_path: Path) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto("/?q=yellow")
    results_are_there(page, 10)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert red + green + blue < 150
    screenshot_is_no_blank(page, tmp_path / "dark.png")
