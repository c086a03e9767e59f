"""support/page.html in a real browser: pictures in, words and boxes out, on a phone and by keyboard alone."""

import base64
import io
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

import serve
import toy
from support.drawing import NAMED
from support.start import load_model

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")
SCENE = toy.scene(0, "heldout", 2)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def server(made):
    server = serve.Server("127.0.0.1", 0, "ck", *load_model(made / "ck", device="cpu"))
    threading.Thread(target=server.serve_forever, args=[0.02]).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pages(browser, server):
    """Opens the page; at the end nothing has gone wrong on it, and nothing was fetched from elsewhere."""
    contexts, wrong = [], []
    address = f"http://127.0.0.1:{server.server_address[1]}/"

    def open_page(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: "status of 400" in line.text or wrong.append(line.text))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        here = (address, "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(here) or wrong.append(r.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def says(server, monkeypatch):
    """The model says these pieces -> what it is asked, and an event that lets the pieces come, set at first"""
    asked, go = [], threading.Event()
    go.set()

    def says(*pieces, pause=0.0):
        def answer(ids, *_, **__):
            asked.append(server.talk.tokenizer.decode([i for i in ids if i >= 0]))
            server.talk.ids = ids
            for piece in pieces:
                go.wait(20)
                time.sleep(pause)
                yield piece

        monkeypatch.setattr(server.talk, "answer", answer)
        return asked, go

    yield says
    go.set()


def drop(page, scene=SCENE):
    """Drop the scene as a file onto the page."""
    png = io.BytesIO()
    toy.draw(scene).save(png, "PNG")
    page.evaluate(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "<img src=x onerror=alert(1)>.png", { type: "image/png" }));
            document.querySelector("#stage").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }""",
        base64.b64encode(png.getvalue()).decode(),
    )
    page.locator("#frame").wait_for()


def press(page, name):
    page.get_by_role("button", name=name).click()
    if name.startswith("Toy scene"):  # a question asked before it has come would be about nothing
        page.get_by_text(f"picture: {name.lower()}").wait_for()


def answer(page, n=0):
    """The model's n-th answer, once it is whole."""
    line = page.locator(".it:not([aria-busy])").nth(n)
    line.wait_for()
    return line.inner_text().removeprefix("Model: ").strip()


def drawn(page):
    """(x1, y1, x2, y2) around the pixels of boxes on the picture, as fractions of it."""
    picture = page.locator("#frame").screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    rows, columns = np.nonzero(abs(pixels - NAMED).max(-1) < 8)
    h, w, _ = pixels.shape
    return columns.min() / w, rows.min() / h, (columns.max() + 1) / w, (rows.max() + 1) / h


def test_a_dropped_scene_is_captioned_as_sample_py_does(pages, server):
    page = pages()
    assert page.get_by_role("button", name="Caption").is_disabled()
    drop(page)
    press(page, "Caption")
    model, tokenizer = server.talk.model, server.talk.tokenizer
    ask = [serve.prompt("caption").replace(serve.MARK, model.config.image_mark)]
    image = toy.draw(SCENE)
    [said] = serve.sample.generate(model, tokenizer, [image], ask, max_new_tokens=30)
    assert answer(page) == said.strip()


def test_the_box_that_the_model_names_is_drawn_on_the_object(pages, says):
    thing = max(SCENE.things, key=lambda thing: thing.cy)
    text = thing.box_text
    asked, go = says(text[:9], text[9:], " there")
    page = pages()
    drop(page)
    page.get_by_role("textbox").fill(f"the {thing.name}")
    press(page, "Point at")
    assert answer(page).endswith("there") and f"<ref>the {thing.name}</ref>" in asked[0]
    page.locator(".box span").evaluate("(label) => label.remove()")
    x1, y1, x2, y2 = drawn(page)
    left, top, right, bottom = (v / toy.SIDE for v in thing.box)
    for outside in (left - x1, top - y1, x2 - right, y2 - bottom):
        assert -0.006 < outside < 0.012  # two decimals, and the pixels of the screen


def test_a_box_is_there_before_the_answer_has_ended(pages, says):
    _, go = says("<box>(0.10,0.20),", "(0.50,0.60)</box>", " and", " more")
    go.clear()
    page = pages()
    drop(page)
    page.get_by_role("textbox").fill("where?")
    page.keyboard.press("Enter")
    page.locator(".it[aria-busy]").wait_for()
    assert page.locator(".box").count() == 0
    go.set()
    page.locator(".box").wait_for()
    assert answer(page) == "▢ (0.10, 0.20) to (0.50, 0.60) and more"


def test_stop_ends_the_answer_and_frees_the_model(pages, server, says):
    says(*["word "] * 5000, pause=0.01)
    page = pages()
    page.get_by_role("textbox").fill("talk")
    press(page, "Send")
    page.get_by_text("word word").wait_for()
    press(page, "Stop")
    assert answer(page).endswith("…")
    says("short")
    page.get_by_role("textbox").fill("again")
    page.keyboard.press("Enter")
    assert answer(page, 1) == "short"
    assert server.waiting == []


def test_what_is_here_by_mouse_and_by_keyboard_alone(pages, says):
    asked, _ = says("a thing")
    page = pages()
    for _ in range(8):  # to the first scene, and it
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.firstElementChild?.alt") == "Toy scene 1":
            break
    page.keyboard.press("Enter")
    page.locator("#frame").wait_for()
    page.get_by_role("button", name="What is here").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Enter")
    assert answer(page) == "a thing"
    assert "<box>(0.33,0.35),(0.63,0.67)</box>" in asked[-1]
    press(page, "What is here")
    place = page.locator("#frame").bounding_box()
    page.mouse.move(place["x"] + place["width"] * 0.2, place["y"] + place["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] * 0.6, place["y"] + place["height"] * 0.75)
    page.mouse.up()
    assert answer(page, 1) == "a thing"
    assert "<box>(0.20,0.25),(0.60,0.75)</box>" in asked[-1]
    assert page.locator(".box").inner_text() == "a thing"


def test_a_conversation_goes_on_until_there_is_a_new_picture(pages, says):
    asked, _ = says("yes")
    page = pages()
    press(page, "Toy scene 2")
    for n, text in enumerate(("one?", "two?")):
        page.get_by_role("textbox").fill(text)
        page.keyboard.press("Enter")
        answer(page, n)
    assert all(word in asked[-1] for word in ("one?", "yes", "two?"))
    press(page, "Toy scene 3")
    page.get_by_role("textbox").fill("three?")
    page.keyboard.press("Enter")
    answer(page, 2)
    assert "one?" not in asked[-1] and "three?" in asked[-1]


def test_html_in_names_questions_and_answers_stays_text(pages, says):
    bad = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    says(bad)
    page = pages()
    drop(page)  # whose name is HTML, too
    page.get_by_role("textbox").fill(bad)
    page.keyboard.press("Enter")
    assert answer(page) == bad
    page.get_by_role("textbox").fill(bad)
    press(page, "Point at")
    assert answer(page, 1) == bad
    assert page.locator("#log img, #log script, #log b, #frame b").count() == 0


def test_an_error_is_said_in_the_conversation(pages):
    page = pages()
    page.get_by_role("textbox").fill("word " * 400)
    page.keyboard.press("Enter")
    page.get_by_text("the model's context is 300").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(pages, says, scheme):
    says("word" * 200)
    page = pages(viewport={"width": 375, "height": 740}, color_scheme=scheme)
    drop(page)
    page.get_by_role("textbox").fill("x" * 60)
    page.keyboard.press("Enter")
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for name in ("Caption", "Point at", "What is here", "Send", "Open a picture", "Toy scene 6"):
        place = page.get_by_role("button", name=name).bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= 375
        assert place["y"] + place["height"] <= 740 and place["height"] >= 36, name
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 300) == (scheme == "dark")


def test_every_control_has_a_name(pages):
    page = pages()
    drop(page)
    for kind, least in (("button", 11), ("textbox", 1), ("group", 3), ("log", 1), ("img", 7)):
        found = page.get_by_role(kind).all()
        names = [one.aria_snapshot().splitlines()[0] for one in found]
        assert len(names) >= least and all(f'{kind} "' in name for name in names), names
