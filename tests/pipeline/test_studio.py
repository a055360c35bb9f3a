"""The studio's page in a real browser that is given no network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.studio_actions import Wish, draw_samples, edit_upload, upsample_upload
from tests.pipeline.studio_pictures import array, pixels_of, sampled, silent
from tests.waiting import PATIENCE, free_port, wait_until

ROOT = Path(__file__).parent.parent.parent


def lacking(what):
    """Skip; where everything must be installed, fail."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{what} is missing")


@pytest.fixture(scope="module")
def address(finished):
    """Where the real command serves the page of a real run."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        lacking("gradio")
    port = free_port()
    command = [sys.executable, "-m", "pipeline", "studio", str(finished / "tiny.yaml"), f"run={finished}/run"]
    log = finished / "studio.log"
    uploads = finished / "uploads"
    uploads.mkdir()
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, f"port={port}"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(uploads)},
        )
    try:
        wait_until(lambda: "octaves studio: " in log.read_text() or server.poll() is not None, "the page")
        assert "octaves studio: " in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}/"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.terminate()
        server.wait(PATIENCE)
    assert server.returncode == 0 and not list(uploads.iterdir())


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        lacking("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    """A new visitor's page; whatever it asks of another host fails the test."""
    opened = visit(browser, address)
    yield opened
    opened.close()
    assert not opened.foreign


def visit(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.foreign = []

    def watch(request):
        if not request.url.startswith((address, "data:", "blob:")):
            page.foreign.append(request.url)

    page.on("request", watch)
    page.goto(address)
    page.get_by_role("button", name="Draw").wait_for()
    return page


def panel(page):
    return page.locator("[role=tabpanel]:visible")


def choose_class(page, name):
    panel(page).get_by_label("class").click()
    page.get_by_role("option", name=name, exact=True).click()


def set_number(page, label, value):
    box = panel(page).get_by_label(label).first
    box.fill(str(value))
    box.press("Tab")


def give(page, place, path):
    """Upload a file and wait until the page has it: its name as text stands there only while it travels."""
    page.locator(f"{place} input[type=file]").set_input_files(path)
    page.locator(place).get_by_label(path.name).wait_for()


def results(page, place, caption):
    """Pictures by caption, once one with ``caption`` is there."""
    page.locator(f"{place} figcaption", has_text=re.compile(f"^{caption}$")).wait_for()
    figures = page.locator(f"{place} figure").evaluate_all(
        "all => all.map(one => [one.innerText.trim(), one.querySelector('img').src, one.querySelector('a').download])"
    )
    return {text: pixels_of(source) for text, source, _ in figures}


def wait_for_scales(page, number):
    """Wait until the pictures have grown to that many scales and stay there: new ones grow by themselves."""
    reach, side = page.get_by_text(f"{number} of 3 scales"), 2 ** (1 + number)
    calm = 0
    for _ in range(600):
        widths = page.locator("#samples img").evaluate_all("all => all.map(one => one.naturalWidth)")
        calm = calm + 1 if widths and set(widths) == {side} and reach.is_visible() else 0
        if calm == 12:  # three seconds: longer than a step of the growing
            return
        page.wait_for_timeout(250)
    raise AssertionError(f"pictures of {widths} px, not {side}")


def test_samples_are_those_of_the_command_and_the_slider_draws_nothing(page, finished, tmp_path):
    choose_class(page, "green")
    set_number(page, "pictures", 4)
    set_number(page, "seed", 11)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("seed 14").wait_for()
    wait_for_scales(page, 3)
    shown = results(page, "#samples", "seed 14")
    wanted = ["classes=green", "count=4", "seed=11"]
    written = sampled(finished, tmp_path / "all", *wanted)
    assert list(shown) == ["seed 11", "seed 12", "seed 13", "seed 14"]
    assert all(np.array_equal(shown[f"seed {seed}"], written[f"green-0000{seed}.png"]) for seed in range(11, 15))
    with page.expect_download() as download:
        page.locator("#samples a").first.click()
    assert download.value.suggested_filename == "green-000011.png"
    assert np.array_equal(np.array(Image.open(download.value.path())), written["green-000011.png"])
    # other controls, no draw: the slider shows what was drawn
    set_number(page, "seed", 99)
    slider = page.locator("#scales input[type=range]")
    slider.fill("2")
    wait_for_scales(page, 2)
    coarse = results(page, "#samples", "seed 14")
    written = sampled(finished, tmp_path / "two", *wanted, "sampling.scales=2")
    assert all(np.array_equal(coarse[f"seed {seed}"], written[f"green-0000{seed}.png"]) for seed in range(11, 15))
    sizes = page.locator("#samples img").evaluate_all("all => all.map(one => [one.naturalWidth, one.clientWidth])")
    slider.fill("3")
    wait_for_scales(page, 3)
    back = results(page, "#samples", "seed 14")
    assert all(np.array_equal(back[name], shown[name]) for name in shown)
    large = page.locator("#samples img").evaluate_all("all => all.map(one => [one.naturalWidth, one.clientWidth])")
    assert [width for width, _ in sizes] == [8] * 4 and [width for width, _ in large] == [16] * 4
    assert {shown for _, shown in sizes} == {shown for _, shown in large}


def test_an_upload_is_upsampled(page, studio, uploads):
    page.get_by_role("tab", name="Upsample").click()
    give(page, "#upsample-upload", uploads / "small.png")
    page.get_by_role("button", name="Upsample").click()
    shown = results(page, "#upsampled", "seed 3")
    expected, about = upsample_upload(studio, str(uploads / "small.png"), 8, 16, Wish(), silent)
    assert list(shown) == [picture.caption for picture in expected]
    assert all(np.array_equal(shown[picture.caption], array(picture.pixels)) for picture in expected)
    page.get_by_text(about).wait_for()


def test_an_upload_is_edited_where_it_was_painted(page, studio, uploads):
    page.get_by_role("tab", name="Edit").click()
    give(page, "#edit-upload", uploads / "full.png")
    page.locator("#painter canvas").click(position={"x": 20, "y": 20})
    choose_class(page, "red")
    page.get_by_role("button", name="Edit", exact=True).click()
    shown = results(page, "#edited", "seed 3")
    expected = edit_upload(studio, str(uploads / "full.png"), 1, "1000", Wish(label=2), silent)
    assert list(shown) == [picture.caption for picture in expected]
    assert all(np.array_equal(shown[picture.caption], array(picture.pixels)) for picture in expected)


def test_wrong_uploads_are_one_line_in_the_page(page, uploads):
    page.get_by_role("tab", name="Edit").click()
    for name, message in (("text.png", "cannot be read as an image"), ("long.png", "an image of 20000 x 10 pixels")):
        give(page, "#edit-upload", uploads / name)
        page.get_by_text(message).first.wait_for()
        panel(page).get_by_label("Clear").click()
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("upload one first").first.wait_for()
    # it goes on
    page.get_by_role("tab", name="Sample", exact=True).click()
    page.get_by_role("button", name="Draw").click()
    results(page, "#samples", "seed 7")


def test_two_visitors_at_once_get_what_each_asked_for(page, browser, address, studio):
    other = visit(browser, address)
    for visitor, name, seed in ((page, "blue", 100), (other, "red", 200)):
        choose_class(visitor, name)
        set_number(visitor, "seed", seed)
    page.get_by_role("button", name="Draw").click(no_wait_after=True)
    other.get_by_role("button", name="Draw").click(no_wait_after=True)
    for visitor, label, seed in ((page, 0, 100), (other, 2, 200)):
        visitor.get_by_text(f"seed {seed + 7}").wait_for()
        wait_for_scales(visitor, 3)
        shown = results(visitor, "#samples", f"seed {seed + 7}")
        expected = draw_samples(studio, Wish(label, count=8, seed=seed), silent).shown(2)
        assert all(np.array_equal(shown[picture.caption], array(picture.pixels)) for picture in expected)
    other.close()
