"""The web page in a real browser, against the service on Ray Serve."""

import base64
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayemb.index import load_manifest, load_map
from rayemb.serve import Client
from rayemb.serve.asgi import create_app
from rayemb.serve.keys import new_key
from tests.serve.conftest import Service, World, draw, tiny_model
from tests.serve.live import listening
from tests.serve.test_items import CONFIG as LIVE
from tests.serve.test_items import emptied, make_place
from tests.serve.writable import Collection

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


def add_filter(page: Page, column: str, asked: str, value: str | None = None) -> None:
    page.get_by_role("button", name="Add a filter").click()
    row = page.locator(".where").last
    row.get_by_label("Filter column").select_option(column)
    row.get_by_label("What is asked of the column").select_option(label=asked)
    field = row.get_by_label("Filter value")
    if value is None:
        expect(field).to_be_hidden()
    elif field.evaluate("each => each.tagName") == "SELECT":
        field.select_option(value)
    else:
        field.fill(value)


def test_filters_are_joined_and_offered_by_type(page: Page) -> None:
    page.locator("#text").fill("something")
    add_filter(page, "size", "is at least", "64")
    add_filter(page, "size", "is under", "88")
    add_filter(page, "round", "is", "true")
    add_filter(page, "colour", "is one of", "red, blue ,pink")
    add_filter(page, "shape", "begins with", "circ")
    add_filter(page, "text", "has a value")
    page.locator(".value").first.press("Enter")
    results_are_there(page, 3)
    assert {fact.split(" · ")[0] for fact in page.locator(".facts").all_text_contents()} == {
        "colour: red",
        "colour: blue",
        "colour: pink",
    }
    offered = page.locator(".where").nth(4).get_by_label("What is asked of the column")
    assert "is over" not in offered.locator("option").all_text_contents()
    page.get_by_role("button", name="Remove this filter").nth(3).click()
    page.locator("#text").press("Enter")
    results_are_there(page, 5)
    page.locator(".where").first.get_by_label("Filter value").fill("100")
    page.locator("#text").press("Enter")
    expect(page.locator("#status")).to_contain_text("Nothing found")
    # By the keyboard alone, from the address alone.
    address = page.url
    page.goto("/")
    expect(page.locator(".where")).to_have_count(0)
    page.goto(address)
    expect(page.locator(".where")).to_have_count(5)
    expect(page.locator("#status")).to_contain_text("Nothing found")
    for _ in range(5):
        page.get_by_role("button", name="Remove this filter").first.press("Enter")
    page.locator("#text").press("Enter")
    results_are_there(page, 10)


def test_errors_are_shown(page: Page, tmp_path: Path) -> None:
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("Type some words or choose a picture first.")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    expect(page.get_by_role("alert")).to_contain_text("image: not an image")
    page.get_by_role("button", name="Remove picture").click()
    page.locator("#text").fill("star")
    add_filter(page, "size", "is", "large")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("filter.size: expected a whole number, got 'large'")
    expect(page.locator(".tile")).to_have_count(0)
    page.goto('/?q=star&filter={"or":[{"size":1}]}')
    expect(page.get_by_role("alert")).to_contain_text("not one that this page can show")


def test_the_address_holds_the_query(page: Page) -> None:
    page.goto('/?q=blue%20circle&k=5&filter={"colour":"blue"}')
    results_are_there(page, 5)
    expect(page.locator("#text")).to_have_value("blue circle")
    expect(page.locator(".value")).to_have_value("blue")
    page.locator("#text").fill("green")
    page.locator("#text").press("Enter")
    expect(page).to_have_url(re.compile("q=green"))
    page.go_back()
    expect(page.locator("#text")).to_have_value("blue circle")
    results_are_there(page, 5)


def test_the_map_is_shown_and_searched(page: Page, world: World, tmp_path: Path) -> None:
    page.get_by_text("Map of the collection").click()
    expect(page.locator("#map-note")).to_contain_text("60 of 60 items")
    page.locator("#colour").select_option("colour")
    expect(page.locator("#legend li")).to_have_count(5)
    page.locator("#map").scroll_into_view_if_needed()
    page.locator("#map").screenshot(path=tmp_path / "map.png")
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)
    drawn = {tuple(each) for each in np.unique(pixels, axis=0).tolist()}
    assert len(drawn) > 20
    # Where the service says a point is, there its item is told, with its picture.
    found = load_map(world.index_uri, load_manifest(world.index_uri))
    assert found is not None
    box = page.locator("#map").bounding_box()
    assert box is not None
    unit = min(box["width"], box["height"]) - 32
    at = np.column_stack((found.x, found.y))
    alone = int(np.argmax([np.sort(((at - each) ** 2).sum(axis=1))[1] for each in at]))
    spot = {
        "x": box["width"] / 2 + (found.x[alone] - 0.5) * unit,
        "y": box["height"] / 2 - (found.y[alone] - 0.5) * unit,
    }
    page.locator("#map").hover(position=spot)
    row = next(each for each in world.rows if each["id"] == found.ids[alone])
    expect(page.locator("#map-tip div")).to_have_text(row["text"])
    expect(page.locator("#map-tip small")).to_have_text(f"colour: {row['colour']}")
    image = page.locator("#map-tip img")
    deadline = time.monotonic() + 15
    while not image.evaluate("each => each.complete && each.naturalWidth > 0"):
        assert time.monotonic() < deadline, "the picture does not load"
        time.sleep(0.05)
    page.locator("#map").click(position=spot)
    results_are_there(page, 10)
    expect(page.locator("#example-name")).to_have_text(row["text"])
    ids = world.expected(world.vectors[world.rows.index(row)], 11)[1:]
    shown = [next(each for each in world.rows if each["id"] == item)["text"] for item in ids]
    assert sorted(page.locator(".caption").all_text_contents()) == sorted(shown)
    page.reload()
    results_are_there(page, 10)
    expect(page.locator("#example-name")).to_have_text(row["id"])


def test_the_map_is_read_by_the_keyboard(page: Page) -> None:
    page.locator("#mapping summary").press("Enter")
    expect(page.locator("#map-body")).to_be_visible()
    told = page.locator("#map-tip div")
    page.locator("#map").press("ArrowRight")
    expect(told).not_to_be_empty()
    first = told.text_content()
    left = page.locator("#map-tip").evaluate("each => each.offsetLeft")
    page.locator("#map").press("ArrowRight")
    page.locator("#map").press("ArrowRight")
    page.locator("#map").press("ArrowRight")
    assert page.locator("#map-tip").evaluate("each => each.offsetLeft") != left or told.text_content() != first
    page.locator("#map").press("+")
    page.locator("#map").press("ArrowUp")
    expect(told).not_to_be_empty()
    page.locator("#map").press("Enter")
    results_are_there(page, 10)


def test_figures_of_the_index_are_told(page: Page, world: World) -> None:
    page.get_by_text("About this index").click()
    facts = page.locator("#index-facts")
    for text in ("default", load_manifest(world.index_uri).version, str(world.model.digest), "Flat", "none are taken"):
        expect(facts).to_contain_text(text)
    expect(page.locator("#shards tr")).to_have_count(2)
    expect(page.locator("#shards tr").first).to_have_text("shard-030")
    expect(page.get_by_role("img", name=re.compile(r"^Recall against .*recall 1\.000"))).to_be_visible()


@pytest.fixture
def writable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A service that takes updates of some keys: its URL and the keys by name."""
    place = emptied(make_place(tmp_path_factory.mktemp("writable")))
    file = str(place.folder / "keys.json")
    keys = {name: new_key(file, name, write=name == "writer") for name in ("reader", "writer")}
    config = LIVE.model_copy(update={"keys": file})
    with listening(create_app(place.engine("together", config), config)) as url:
        yield url, keys


def test_items_are_stored_found_and_deleted(
    browser: Browser, writable: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    url, keys = writable
    expect.set_options(timeout=15_000)
    context = browser.new_context(base_url=url, http_credentials={"username": "any", "password": keys["writer"]})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    page.goto("/")
    expect(page.locator("#about")).to_contain_text("20 items")
    page.locator("#put").evaluate(
        """(target, data) => {
            const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], 'new picture.png', {type: 'image/png'}));
            target.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true}));
        }""",
        base64.b64encode(draw("green", "star", 77)).decode(),
    )
    expect(page.get_by_alt_text("The item's picture")).to_be_visible()
    expect(page.get_by_label("Id", exact=True)).to_have_value("new picture.png")
    page.get_by_label("text", exact=True).fill("a dropped picture")
    page.get_by_label("size", exact=True).fill("many")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("alert")).to_contain_text("items.0.payload.size")
    page.get_by_label("size", exact=True).fill("77")
    page.get_by_role("button", name="Store").click()
    expect(page.locator("#item-status")).to_contain_text("new picture.png is stored")
    expect(page.locator("#about")).to_contain_text("21 items")
    page.get_by_label("Id", exact=True).fill("words")
    page.get_by_label("or text, to be found by").fill("purple whale")
    page.get_by_role("button", name="Store").click()
    expect(page.locator("#item-status")).to_contain_text("words is stored")
    with page.expect_request("**/v1/search") as sent:
        page.locator("#text").fill("purple whale")
        page.locator("#text").press("Enter")
    assert sent.value.post_data_json["at_least"] == 2
    expect(page.locator(".caption").first).to_have_text("purple whale")
    page.locator("#text").fill("")
    (tmp_path / "same.png").write_bytes(draw("green", "star", 77))
    page.set_input_files("#file", tmp_path / "same.png")
    expect(page.locator(".caption").first).to_have_text("a dropped picture")
    expect(page.locator(".score").first).to_have_text("1.000")
    expect(page.locator(".facts").first).to_have_text("size: 77")
    page.get_by_role("button", name="Delete a dropped picture", exact=True).click()
    page.get_by_role("button", name="Really delete a dropped picture", exact=True).click()
    expect(page.locator("#status")).to_have_text("new picture.png is deleted.")
    expect(page.get_by_text("a dropped picture")).to_have_count(0)
    page.get_by_text("About this index").click()
    expect(page.locator("#index-facts")).to_contain_text("Updates waiting3")
    # No map of this index was made: it says so, and how to make one.
    page.get_by_text("Map of the collection").click()
    expect(page.locator("#map-note")).to_contain_text("rayemb index map")
    context.close()
    assert problems == []
    with Client(url, key=keys["reader"]) as client:
        assert set(client.get(["words", "new picture.png"])) == {"words"}


def test_fields_and_filters_of_every_type(browser: Browser, tmp_path: Path) -> None:
    kinds = {"tags": "strings", "sold": "boolean", "added": "timestamp", "place": "point", "count": "integer"}
    model = tiny_model(["red star", "blue square"], seed=1)
    with listening(Collection(tmp_path, model, kinds).app()) as url:
        page = browser.new_context(base_url=url).new_page()
        page.goto("/?q=star")
        expect(page.locator("#about")).to_contain_text("0 items")
        page.locator("#put summary").click()
        for item, values in (
            ("berlin", {"tags": "red, big", "added": "2026-01-31", "place": "52.5, 13.4", "count": "9007199254740993"}),
            ("paris", {"tags": "blue", "added": "2026-03-01T12:00Z", "place": "48.9,2.35", "count": "7"}),
        ):
            page.get_by_label("Id", exact=True).fill(item)
            page.get_by_label("or text, to be found by").fill("star")
            page.get_by_label("sold", exact=True).select_option("true" if item == "paris" else "false")
            for column, value in values.items():
                page.get_by_label(column, exact=True).fill(value)
            page.get_by_role("button", name="Store").click()
            if item == "berlin":  # a number that the page would change is not sent as one
                expect(page.locator("#item-error")).to_contain_text("items.0.payload.count")
                page.get_by_label("count", exact=True).fill("-3")
                page.get_by_role("button", name="Store").click()
            expect(page.locator("#item-status")).to_contain_text(f"{item} is stored")
        page.locator("#text").press("Enter")
        expect(page.locator(".tile")).to_have_count(2)
        for column, asked, value, found in (
            ("tags", "is", "big", ["berlin"]),
            ("tags", "is one of", "big, blue", ["berlin", "paris"]),
            ("tags", "is not", "big", ["paris"]),
            ("sold", "is", "true", ["paris"]),
            ("added", "is under", "2026-02-01", ["berlin"]),
            ("added", "is at least", "2026-03-01T13:00+01:00", ["paris"]),
            ("place", "is within", "52, 13, 100", ["berlin"]),
            ("place", "is missing", None, []),
            ("count", "is over", "0.5", ["paris"]),
        ):
            add_filter(page, column, asked, value)
            page.locator("#text").press("Enter")
            expect(page.locator(".caption")).to_have_text(found)
            page.goto(page.url)  # the address has it all
            expect(page.locator(".where")).to_have_count(1)
            expect(page.locator(".caption")).to_have_text(found)
            page.get_by_role("button", name="Remove this filter").click()
        add_filter(page, "place", "is within", "52, 13")
        page.locator("#text").press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("filter.place.within.km")
        page.context.close()


def test_a_key_that_may_not_write_is_told(browser: Browser, writable: tuple[str, dict[str, str]]) -> None:
    url, keys = writable
    context = browser.new_context(base_url=url, http_credentials={"username": "any", "password": keys["reader"]})
    page = context.new_page()
    page.goto("/?q=red")
    expect(page.locator(".tile").first).to_be_visible()
    page.locator("#put summary").click()
    page.get_by_label("Id", exact=True).fill("mine")
    page.get_by_label("or text, to be found by").fill("anything")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("alert")).to_have_text("authorization: this key may not write")
    context.close()


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
