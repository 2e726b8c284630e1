"""The page of a plan in headless Chromium: it opens at once and alone, fits wide and narrow windows, light and dark, and answers clicks."""

import io
import json
import os
import shutil
from dataclasses import replace

import pytest

import seqpar
from seqpar.models import registry
from seqpar.passes.draw_html import to_html
from seqpar.passes.drawing import drawing

webdriver = pytest.importorskip("selenium.webdriver", reason="no browser driver: pip install selenium")
from PIL import Image, ImageStat  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: needs chromium and chromedriver (apt-get install chromium chromium-driver)")
ALONE = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
SECONDS = 2.0
TEXT = ("h1", ".soft", "summary b", "summary.sharded span", "summary.whole span", ".legend .attention", ".legend .collective", "button", ".bar b")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*ALONE, "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # Paths given, so that selenium looks for nothing and downloads nothing.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def drawn():
    """A small model with the blocks of a large one: equal ones are folded, so that their number does not change the page."""
    family = registry.get("flux")
    config = family.tiny_config(layers=2)
    model = family.build(config, device="meta")
    plan = seqpar.plan(model, family.example_inputs(config, height=256, width=256, device="meta"), ulysses=2, ring=2)
    return drawing(plan.inspector.partitioned)


@pytest.fixture(scope="module")
def page(drawn, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(to_html(drawn, "a plan"), encoding="utf-8")
    return path


def show(browser, page, width=1280, dark=False):
    """Opens the page; the seconds until all of it was laid out."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())
    return browser.execute_script("document.body.getBoundingClientRect(); return performance.now()") / 1000


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def contrast(browser, selector):
    """Of an element's text on what is behind it, as WCAG 2 defines it."""
    return browser.execute_script(
        """
        const numbers = text => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const element = document.querySelector(arguments[0]);
        let behind = element;
        while (behind.parentElement && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
        const [a, b] = [numbers(getComputedStyle(element).color), numbers(getComputedStyle(behind).backgroundColor)].map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        """,
        selector,
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_can_be_read(browser, page, width, dark):
    show(browser, page, width, dark)
    browser.execute_script("document.querySelector('details[open] g.box').scrollIntoView({block: 'end'})")  # as Tab does: not behind the bars
    one(browser, "details[open] g.box").click()
    assert browser.execute_script("return innerWidth") == width and browser.execute_script("return document.documentElement.scrollWidth") <= width
    for element in browser.find_elements(By.CSS_SELECTOR, "summary, .bar, #find, #detail, .legend span"):
        assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= width, element.text
    assert {selector: contrast(browser, selector) for selector in TEXT if contrast(browser, selector) < 4.5} == {}
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    if os.environ.get("SEQPAR_SCREENSHOTS"):  # a folder, for people
        image.save(os.path.join(os.environ["SEQPAR_SCREENSHOTS"], f"plan-{width}-{'dark' if dark else 'light'}.png"))
    brightness = ImageStat.Stat(image.convert("L")).mean[0]
    assert image.width == width and (brightness < 70 if dark else brightness > 200) and len(image.getcolors(1 << 20)) > 50


def test_clicks(browser, page):
    show(browser, page)
    opened, closed = one(browser, "details[open]"), one(browser, "details:not([open])")
    one(browser, "details[open] summary").click()
    assert not opened.get_attribute("open") and not opened.find_element(By.CSS_SELECTOR, "svg").is_displayed()
    closed.find_element(By.TAG_NAME, "summary").click()
    assert closed.get_attribute("open") and closed.find_element(By.CSS_SELECTOR, "svg").is_displayed()
    stages = browser.find_elements(By.TAG_NAME, "details")
    one(browser, "#all").click()
    assert all(stage.get_attribute("open") for stage in stages)
    one(browser, "#all").click()
    assert not any(stage.get_attribute("open") for stage in stages)


def test_a_box_says_layout_and_source_line(browser, page):
    show(browser, page)
    box = "details[open] g.box:has(rect.sharded)"
    tooltip = one(browser, f"{box} title").get_attribute("textContent")
    one(browser, box).click()
    detail = one(browser, "#detail").text
    assert "layout 1 256/4 64" in detail and "in forward: " in detail and ".py:" in detail
    assert "1 256/4 64" in tooltip and ".py:" in tooltip
    one(browser, "details[open] g.box:has(rect.collective)").send_keys(Keys.ENTER)
    assert "receives 26.1 kB" in one(browser, "#detail").text and len(browser.find_elements(By.CSS_SELECTOR, "g.open")) == 1


def test_search(browser, page):
    show(browser, page)
    one(browser, "body").send_keys("/", "rms_norm")
    assert one(browser, "#query").get_attribute("value") == "rms_norm" and one(browser, "#hits").text == "3 boxes"
    assert len(browser.find_elements(By.CSS_SELECTOR, "g.hit")) == 3
    one(browser, "#query").send_keys(Keys.ENTER, Keys.ENTER)
    assert one(browser, "#hits").text == "2 of 3 boxes" and "rms_norm" in one(browser, "#detail .hit").text
    assert 0 <= browser.execute_script("return document.querySelector('g.open').getBoundingClientRect().top") < 900, "scrolled to"
    one(browser, "#query").clear()
    one(browser, "#query").send_keys("no such operator", Keys.ENTER)
    assert one(browser, "#hits").text == "0 boxes" and not browser.find_elements(By.CSS_SELECTOR, "g.hit")


def test_it_opens_at_once_and_asks_for_nothing(browser, drawn, page, tmp_path):
    """Also unfolded: as many blocks as a full-size model has, none equal to the next."""
    blocks = [stage for stage in drawn.stages if "transformer_blocks" in stage.title]
    many = [replace(blocks[i % len(blocks)], names=(f"block.{i}",)) for i in range(57)]
    unfolded = tmp_path / "unfolded.html"
    unfolded.write_text(to_html(replace(drawn, stages=(*drawn.stages, *many), repeats=(*drawn.repeats, *[1] * len(many))), "many"), encoding="utf-8")
    browser.get_log("performance"), browser.get_log("browser")
    assert min(show(browser, page) for _ in range(3)) < SECONDS
    assert min(show(browser, unfolded) for _ in range(3)) < SECONDS and len(browser.find_elements(By.TAG_NAME, "details")) > 57
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent"}
    assert asked == {page.as_uri(), unfolded.as_uri()}
    assert [entry["message"] for entry in browser.get_log("browser")] == []
