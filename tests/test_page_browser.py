"""The report's page in a real browser: filter, sort, expand by keyboard, read a number; narrow, and in the dark."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxsparse
from fxsparse import page
from fxsparse.pictures import picture
from fxsparse.report import Report
from tests.models import random_masks, small_net

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_BROWSER = next(filter(None, map(shutil.which, _BROWSERS)), None)
_DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    _BROWSER is None or _DRIVER is None,
    reason=f"one of {', '.join(_BROWSERS)} and chromedriver are needed in PATH",
)

_HOSTILE = "</script><b>bold</b>"
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def report() -> Report:
    """Return the report of a real conversion, its first convolution sparse and the others vanilla on any machine."""
    torch.manual_seed(0)
    model = small_net()
    masks = random_masks(model)
    masks["stem.0"][:, 0] = True  # one block
    settings = fxsparse.Settings(cache=False)
    converted = fxsparse.convert(model, masks, example_inputs=torch.randn(1, 3, 16, 16), settings=settings)
    rows = []
    for number, row in enumerate(converted.report.rows):
        mask = masks[row.name]
        drawn = picture(mask.flatten(1).numpy(), fxsparse.regroup(mask, cache=False))
        path, reason = ("sparse", "measured") if number == 0 else ("vanilla", f"sparse does not win by {number}%")
        rows.append(dataclasses.replace(row, path=path, reason=reason, picture=drawn))
    rows[-1] = dataclasses.replace(rows[-1], reason=_HOSTILE)
    return dataclasses.replace(converted.report, rows=tuple(rows))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = _BROWSER
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, report: Report, tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """Open the page as a file, 1280 pixels wide in the light theme; afterwards the console must be empty."""
    file = tmp_path / "report.html"
    report.to_html(file)
    _resize(browser, 1280)
    _theme(browser, "light")
    browser.get(file.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def _resize(browser: webdriver.Chrome, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _theme(browser: webdriver.Chrome, theme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def _visible(browser: webdriver.Chrome) -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, "#rows > li")
    return [row.get_attribute("data-name") for row in rows if row.is_displayed()]


def _background(browser: webdriver.Chrome) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def _tab_to(browser: webdriver.Chrome, selector: str) -> WebElement:
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.execute_script("return document.activeElement.matches(arguments[0])", selector):
            return browser.switch_to.active_element
    raise AssertionError(f"Tab does not reach {selector}")


def _numbers(browser: webdriver.Chrome) -> dict[str, str]:
    """Return the numbers of the one layer that is open, by title, without their explanations."""
    detail = browser.find_element(By.CSS_SELECTOR, ".detail:not([hidden])")
    titles = [title.text for title in detail.find_elements(By.TAG_NAME, "dt")]
    return dict(
        zip(titles, (text.text.split("\n")[0] for text in detail.find_elements(By.TAG_NAME, "dd")), strict=True)
    )


def test_text_and_path_filter_the_rows(opened: webdriver.Chrome, report: Report) -> None:
    names = [row.name for row in report.rows]
    assert sorted(_visible(opened)) == sorted(names)
    opened.find_element(By.ID, "text").send_keys("block")
    assert sorted(_visible(opened)) == sorted(name for name in names if "block" in name)
    assert opened.find_element(By.ID, "shown").text == "3 of 4 convolutions shown"
    opened.find_element(By.XPATH, "//label[normalize-space()='Sparse']").click()
    assert _visible(opened) == []
    opened.find_element(By.ID, "text").send_keys(Keys.BACKSPACE * len("block"))
    assert _visible(opened) == ["stem.0"]


def test_a_reason_shows_its_rows_and_shows_all_again(opened: webdriver.Chrome, report: Report) -> None:
    alike = opened.find_element(By.CSS_SELECTOR, ".why button[data-kind^='sparse does not win']")
    assert "2\u00d7" in alike.text and "(and alike)" in alike.text
    alike.click()
    assert sorted(_visible(opened)) == ["block.conv1", "block.conv2"]
    alike.click()
    assert len(_visible(opened)) == len(report.rows)


def test_rows_sort(opened: webdriver.Chrome, report: Report) -> None:
    by_time = sorted(report.rows, key=lambda row: -row.vanilla_ms)
    assert _visible(opened) == [row.name for row in by_time]
    sort = Select(opened.find_element(By.ID, "sort"))
    sort.select_by_value("name")
    assert _visible(opened) == sorted(row.name for row in report.rows)
    sort.select_by_value("graph")
    assert _visible(opened) == [row.name for row in report.rows]


def test_the_keyboard_opens_a_layer_and_its_numbers_are_the_reports(opened: webdriver.Chrome, report: Report) -> None:
    button = _tab_to(opened, ".name")
    row = report.row(button.text)
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    numbers = _numbers(opened)
    assert float(numbers["Vanilla"].removesuffix(" ms")) == pytest.approx(row.vanilla_ms, rel=0.005, abs=5e-5)
    assert numbers["Weight"] == "\u00d7".join(map(str, row.weight_shape))
    assert numbers["Blocks"] == str(row.blocks)
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-expanded") == "false"
    assert not opened.find_elements(By.CSS_SELECTOR, ".detail:not([hidden])")


def test_an_open_layer_shows_both_pictures(opened: webdriver.Chrome, report: Report) -> None:
    opened.find_element(By.CSS_SELECTOR, "li[data-name='stem.0'] .name").click()
    before, after = opened.find_elements(By.CSS_SELECTOR, ".matrix")
    drawn = report.row("stem.0").picture
    for matrix in (before, after):
        image = matrix.find_element(By.TAG_NAME, "img")
        opened.execute_async_script("arguments[0].decode().then(arguments[1])", image)
        assert image.get_property("naturalWidth") == drawn.before.shape[1]
        assert image.size["height"] > 20
    assert not before.find_elements(By.TAG_NAME, "i")
    outline = after.find_elements(By.TAG_NAME, "i")
    assert len(outline) == len(drawn.outlines)
    assert outline[0].size["width"] == pytest.approx(after.size["width"] * drawn.outlines[0][2], abs=3)


def test_names_and_reasons_stay_text(opened: webdriver.Chrome) -> None:
    assert not opened.find_elements(By.XPATH, "//b[text()='bold']")
    assert _HOSTILE in opened.find_element(By.ID, "rows").text


def test_nothing_scrolls_sideways_on_a_phone(opened: webdriver.Chrome) -> None:
    for width in (390, 320):
        _resize(opened, width)
        for button in opened.find_elements(By.CSS_SELECTOR, ".name[aria-expanded='false']"):
            button.click()
        wide = opened.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width


def test_the_theme_follows_the_system_and_the_button(opened: webdriver.Chrome) -> None:
    light = _background(opened)
    _theme(opened, "dark")
    dark = _background(opened)
    assert dark != light
    button = _tab_to(opened, "#theme")
    button.send_keys(Keys.ENTER)
    assert (button.text, _background(opened)) == ("Theme: light", light)
    button.send_keys(Keys.ENTER)
    assert (button.text, _background(opened)) == ("Theme: dark", dark)


def test_a_report_without_convolutions_or_measurements_opens(
    opened: webdriver.Chrome, report: Report, tmp_path: Path
) -> None:
    unknown = dict.fromkeys(("vanilla_ms", "sparse_ms", "bound_ms", "macs", "sparse_macs", "picture"))
    rows = tuple(dataclasses.replace(row, **unknown) for row in report.rows)
    for shown, headline in (((), "No convolutions"), (rows, "1 of 4 convolutions sparse")):
        other = dataclasses.replace(report, rows=shown, model_ms=None, model_vanilla_ms=None)
        (tmp_path / "other.html").write_text(page.render(other), encoding="utf-8")
        opened.get((tmp_path / "other.html").as_uri())
        assert opened.find_element(By.ID, "headline").text == headline
    assert "Nothing was measured" in opened.find_element(By.ID, "subline").text
