"""The studio: its actions as functions, and its page in a real browser that is given no network."""

import base64
import io
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.edit import edit_pixels
from pipeline.models import load_models
from pipeline.run import RunError
from pipeline.studio import load_run
from pipeline.studio_actions import (
    Studio,
    Wish,
    check_upload,
    draw_samples,
    edit_upload,
    mask_pixels,
    read_wish,
    reduce_by_averaging,
    upsample_upload,
)
from pipeline.studio_looks import data_uri, pictures
from stages.measures.upsampling import reduce_to
from stages.prior.sampling import SamplingConfig

ROOT = Path(__file__).parent.parent.parent
GREEN = 1


def silent(share):
    assert 0 < share <= 1


@pytest.fixture(scope="module")
def studio(finished):
    config = load_config(finished / "tiny.yaml", [f"run={finished}/run"])
    return Studio(config, load_models(config))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory, image_folder):
    """Files that somebody may drop on the page."""
    folder = tmp_path_factory.mktemp("uploads")
    source = Image.open(image_folder / "green/000.png")
    source.save(folder / "full.png")
    source.resize((8, 8), Image.Resampling.BOX).save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    Image.new("1", (20_000, 10)).save(folder / "long.png")
    return folder


def sampled(finished, out, *items):
    """Pictures uint8 [h, w, 3] by file name, as ``octaves sample`` writes them."""
    assert main(["sample", str(finished / "tiny.yaml"), f"run={finished}/run", f"out={out}", *items]) == 0
    return {path.name: np.array(Image.open(path)) for path in out.iterdir() if path.name != "grid.png"}


def array(pixels):
    return pixels.permute(1, 2, 0).numpy()


def test_a_draw_equals_the_sample_command_at_every_number_of_scales(studio, finished, tmp_path):
    done = []
    drawn = draw_samples(studio, Wish(GREEN, count=3, seed=5, guidance=2.0, temperature=0.5), done.append)
    assert done[-1] == 1 and done == sorted(done)
    settings = ["classes=green", "count=3", "seed=5", "sampling.guidance=2.0", "sampling.temperature=[0.5]"]
    for step, (number, _) in enumerate(drawn.steps):
        written = sampled(finished, tmp_path / str(number), *settings, f"sampling.scales={number}")
        shown = {f"{picture.name}.png": array(picture.pixels) for picture in drawn.shown(step)}
        assert shown.keys() == written.keys() == {f"green-00000{seed}.png" for seed in (5, 6, 7)}
        assert all(np.array_equal(shown[name], written[name]) for name in written)
    assert [number for number, _ in drawn.steps] == [1, 2, 3]


def test_upsampling_shows_input_bicubic_upload_and_candidates(studio, uploads):
    shown, about = upsample_upload(studio, str(uploads / "full.png"), 4, 8, Wish(count=2), silent)
    assert [picture.caption for picture in shown] == [
        "input, 4 px",
        "bicubic",
        "the upload at 8 px",
        "seed 0",
        "seed 1",
    ]
    assert [picture.pixels.shape[-1] for picture in shown] == [4, 8, 8, 8, 8] and " dB" in about
    shown, _ = upsample_upload(studio, str(uploads / "small.png"), 8, 16, Wish(count=1), silent)
    assert np.array_equal(array(shown[0].pixels), np.array(Image.open(uploads / "small.png")))
    assert shown[-1].pixels.shape[-1] == 16


def test_reducing_by_averaging_is_the_measures_own_where_sides_divide():
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert torch.equal(reduce_by_averaging(pixels, 4), reduce_to(pixels.unsqueeze(0), 4)[0])
    assert reduce_by_averaging(pixels, 5).shape == (3, 5, 5)


def test_an_edit_is_the_edit_commands_own_under_what_was_painted(studio, uploads):
    path = str(uploads / "full.png")
    shown = edit_upload(studio, path, 1, "1000", Wish(GREEN, count=2), silent)
    assert [picture.caption for picture in shown] == ["original", "decoded", "seed 0", "seed 1"]
    original, prompts = shown[0].pixels, studio.models.prompts([GREEN] * 2, [""] * 2)
    assert np.array_equal(array(original), np.array(Image.open(path)))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8, :8] = True
    many = original.expand(2, -1, -1, -1)
    expected = edit_pixels(studio.models, many, 1, prompts, SamplingConfig(), [0, 1], mask)
    assert torch.equal(torch.stack([picture.pixels for picture in shown[2:]]), expected)
    with pytest.raises(RunError, match="frozen=0; allowed: 1 to 2"):
        edit_upload(studio, path, 0, "0000", Wish(GREEN), silent)


def test_a_painted_mask_covers_its_cells():
    mask = mask_pixels("0100", 2, 16)
    assert mask.shape == (16, 16) and mask[:8, 8:].all() and mask.sum() == 64
    assert mask_pixels("", 2, 16) is None and mask_pixels("0000", 2, 16) is None
    for wrong in ("01", "01000", "01a0"):
        with pytest.raises(RunError, match="allowed: 4 times 0 or 1"):
            mask_pixels(wrong, 2, 16)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(count=17), "images=17; allowed: 1 to 16"),
        (Wish(count=0), "images=0"),
        (Wish(guidance=math.nan), "guidance=nan; allowed: 0 to 20"),
        (Wish(guidance=-1.0), "guidance=-1.0"),
        (Wish(temperature=-0.5), "temperature=-0.5; allowed: 0 to 5"),
        (Wish(seed=-1), "seed=-1"),
        (Wish(seed=2**31), "seed=2147483648"),
        (Wish(label=3), "class 3; allowed: -1 (none) to 2"),
        (Wish(text="a"), "trained without captions"),
        (Wish(text="a" * 10_001), "a caption of 10001 letters; allowed: up to 10000"),
    ],
)
def test_wishes_out_of_range_are_refused(studio, wish, message):
    with pytest.raises(RunError, match=re.escape(message)):
        draw_samples(studio, wish, silent)


def test_values_of_a_page_are_numbers_or_refused():
    assert read_wish(1, None, 4.0, 1, 1, 7) == Wish(1, "", 4, 1.0, 1.0, 7)
    for values in ((1, "", None, 1, 1, 0), (1, "", 4, "x", 1, 0), (1, "", 4, 1, math.inf, 0), (1, "", 1.5, 1, 1, 0)):
        with pytest.raises(RunError):
            read_wish(*values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "no picture that can be read"),
        ("long.png", "a picture of 20000 x 10 pixels; allowed: 4096 a side"),
        (None, "upload one first"),
    ],
)
def test_uploads_are_judged_by_their_header(uploads, name, message, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("a refused upload was decoded"))
    with pytest.raises(RunError, match=re.escape(message)):
        check_upload(name and str(uploads / name))


def test_pictures_stand_in_the_page_with_their_own_pixels(studio):
    shown = draw_samples(studio, Wish(GREEN, count=1), silent).shown(2)[0]
    html = pictures([shown._replace(caption='<b>"seed"</b>')])
    assert "<b>" not in html and 'class="pixelated"' in html
    assert np.array_equal(pixels_of(re.search(r'src="([^"]+)"', html)[1]), array(shown.pixels))
    assert pixels_of(data_uri(torch.zeros(1, 4, 4, dtype=torch.uint8))).shape == (4, 4)


def test_a_runs_folder_opens_without_its_yaml(finished, tmp_path):
    config = load_run(str(finished / "run"), ["sampling.guidance=2.0"])
    assert (config.run, config.images.size, config.sampling.guidance) == (str(finished / "run"), 16, 2.0)
    assert config.tokenizer.path == f"{finished}/run/tokenizer/tokenizer.safetensors"
    with pytest.raises(RunError, match="is no finished run"):
        load_run(str(tmp_path), [])


def pixels_of(uri):
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


# ---------------------------------------------------------------------------------------------------- in a browser


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
        for _ in range(800):
            if "octaves studio: " in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.25)
        assert "octaves studio: " in log.read_text(), log.read_text()
        yield f"http://127.0.0.1:{port}/"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.terminate()
        server.wait(60)
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
    for name, message in (("text.png", "no picture that can be read"), ("long.png", "a picture of 20000 x 10 pixels")):
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
