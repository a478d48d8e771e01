"""The page of `python -m rcm.report` in Chromium: it loads nothing, reacts, and fits the screen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from rcm.evaluation.page.collect import read_runs
from rcm.evaluation.page.page import page
from tests.rcm.evaluation.written_runs import write_run, write_unfinished

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage"),
)
LONG_NAME = "a-run-with-a-long-name-" + "and-no-space-" * 4

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None,
        reason="needs Chromium: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two seeds, a run with another setting and a long name, and an unfinished one."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / "s0", fd=3.0),
        write_run(folder / "s1", fd=5.0, seed=1, iterations=400),
        write_run(folder / LONG_NAME, fd=4.0, lr=1e-3),
        write_unfinished(folder / "unfinished", method="rcm", iterations=20),
    ]
    path = folder / "report.html"
    path.write_bytes(page(read_runs(runs)))
    return path.as_uri()


@pytest.fixture
def browser(started: webdriver.Chrome, address: str) -> webdriver.Chrome:
    """The page, just loaded, in a window of 1400 × 900 pixels and light mode."""
    show(started, 1400, "light")
    started.get(address)
    return started


def show(browser: webdriver.Chrome, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 1000}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(inside: Any, selector: str) -> list[WebElement]:
    found: list[WebElement] = inside.find_elements(By.CSS_SELECTOR, selector)
    return found


def visible(browser: webdriver.Chrome, elements: list[WebElement]) -> set[bool]:
    """Whether they are displayed. Selenium and checkVisibility() judge SVG by other rules."""
    script = "return arguments[0].map((x) => getComputedStyle(x).display !== 'none')"
    return set(browser.execute_script(script, elements))


def column(browser: webdriver.Chrome, place: int) -> list[str]:
    """Of the students' rows in the table of scores."""
    cells = find(browser, f".sortable tbody:nth-of-type(1) tr > :nth-child({place})")
    return [cell.text.split()[0] for cell in cells]


def head(browser: webdriver.Chrome, title: str) -> WebElement:
    [found] = [h for h in find(browser, ".sortable th") if " ".join(h.text.split()) == title]
    return found


# What it loads


def test_nothing_is_loaded_and_nothing_fails(browser: webdriver.Chrome) -> None:
    browser.get_log("performance")
    browser.get_log("browser")
    browser.refresh()
    for button in find(browser, "th button, .legend button, summary"):
        browser.execute_script("arguments[0].click()", button)
    assert browser.get_log("browser") == []
    messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if "requestWill" in m["method"]]
    assert browser.current_url in requests  # the log sees requests
    others = [url for url in requests if url != browser.current_url]
    assert all(url.startswith("data:") for url in others), others


# What it does


def test_a_click_on_a_head_sorts_by_its_column(browser: webdriver.Chrome) -> None:
    fd = head(browser, "FD ↓")
    find(fd, "button")[0].click()
    values = list(map(float, column(browser, 7)))
    assert values == sorted(values)
    assert values[0] == 0.75
    assert fd.get_attribute("aria-sort") == "ascending"
    find(fd, "button")[0].click()
    assert list(map(float, column(browser, 7))) == sorted(values, reverse=True)
    assert fd.get_attribute("aria-sort") == "descending"


def test_the_first_click_sorts_the_best_values_to_the_top(browser: webdriver.Chrome) -> None:
    recall = head(browser, "Recall ↑")
    for expected in (["0.500"] * 3, ["0.125"] * 3):
        find(recall, "button")[0].click()
        found = column(browser, 11)
        assert found[:3] == expected
        assert found[-2:] == ["–", "–"]  # of the run without an evaluation, in both directions


def test_a_column_of_names_sorts_by_name(browser: webdriver.Chrome) -> None:
    button = find(head(browser, "Run"), "button")[0]
    button.send_keys(Keys.ENTER)
    names = column(browser, 1)
    assert names == sorted(names)
    assert len(set(names)) == 4


def test_a_button_of_the_legend_hides_a_run(browser: webdriver.Chrome) -> None:
    [button] = find(browser, '.legend button[data-toggle="0"]')
    marks = find(browser, '[data-run="0"]')
    others = find(browser, '[data-run="1"]')
    assert len(marks) > 10
    assert visible(browser, marks + others) == {True}
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert visible(browser, marks) == {False}
    assert visible(browser, others) == {True}
    browser.execute_script("arguments[0].focus()", button)
    ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert button.get_attribute("aria-pressed") == "true"
    assert visible(browser, marks) == {True}


def test_the_keyboard_reaches_every_button(browser: webdriver.Chrome) -> None:
    reached = []
    for _ in range(30):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.switch_to.active_element)
    assert set(find(browser, ".legend button, th button")) <= set(reached)


def test_the_values_of_curves_are_shown_at_the_pointer(browser: webdriver.Chrome) -> None:
    [figure] = [f for f in find(browser, "figure") if f.text.startswith("Probe RMSE")]
    [svg] = find(figure, "svg")
    [box] = find(figure, ".readout")
    assert not box.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    left = -svg.size["width"] / 2  # of the middle of the figure, which has 380 units
    ActionChains(browser).move_to_element_with_offset(
        svg, int(left + 84 * svg.size["width"] / 380), 0
    ).perform()
    assert box.is_displayed()
    assert len(find(box, "div")) == 1 + 3  # the unfinished run has ended
    [iteration] = re.findall(r"iteration\s+(\d+)", box.text)
    assert 38 <= int(iteration) <= 46
    [rmse] = re.findall(r"s0\s+([\d.]+)", box.text)
    assert float(rmse) == pytest.approx(0.2, abs=0.003)  # its last one, of iteration 40
    [other] = re.findall(r"s1\s+([\d.]+)", box.text)
    assert float(other) == pytest.approx(0.38, abs=0.003)
    assert box.rect["y"] >= svg.rect["y"] and box.rect["y"] < svg.rect["y"] + 50
    ActionChains(browser).move_by_offset(60, 0).perform()
    assert "s1" in box.text
    assert "s0" not in box.text  # it has ended
    ActionChains(browser).move_by_offset(0, -400).perform()
    assert not box.is_displayed()


def test_the_sample_under_the_pointer_is_framed_everywhere(browser: webdriver.Chrome) -> None:
    tiles = find(browser, ".tiles")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tiles[2])
    ActionChains(browser).move_to_element_with_offset(tiles[2], 5, 5).perform()
    frames = find(browser, ".cursor")
    assert len(frames) == len(tiles) == 2 + 3 * 3
    assert all(frame.is_displayed() for frame in frames)
    places = browser.execute_script(
        """return arguments[0].map((frame) => {
          const [inner, outer] = [frame, frame.parentNode].map((x) => x.getBoundingClientRect());
          return [inner.left - outer.left, inner.top - outer.top, inner.width, inner.height];
        })""",
        frames,
    )
    # The sample of the middle: 8 columns in 146 pixels, 10 rows in 182.
    expected = pytest.approx([4 / 8 * 146, 5 / 10 * 182, 146 / 8, 182 / 10], abs=0.1)
    assert places == [expected] * len(tiles)


# What it looks like


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_width(width: int, browser: webdriver.Chrome) -> None:
    show(browser, width, "light")
    for details in find(browser, "summary"):
        browser.execute_script("arguments[0].click()", details)
    root = "document.documentElement"
    room = browser.execute_script(f"return {root}.clientWidth")
    assert width - 20 <= room <= width  # a scroll bar takes some
    assert browser.execute_script(f"return {root}.scrollWidth") == room
    outside = browser.execute_script(
        """return [...document.querySelectorAll("h1, h2, h3, p, .scroll, svg, svg text, img")]
        .filter((x) => !x.closest(".legend"))
        .map((x) => [x.getBoundingClientRect(), x.outerHTML])
        .filter(([box, _]) => box.left < 0 || box.right > document.documentElement.clientWidth)
        .map(([_, html]) => html)"""
    )
    assert outside == []


def test_pictures_are_shown_pixel_by_pixel(browser: webdriver.Chrome) -> None:
    images = find(browser, "img")
    assert len(images) == 2 + 3 * 3
    for image in images:
        assert image.is_displayed()
        assert image.get_property("naturalWidth") == 73
        assert image.get_property("naturalHeight") == 91
        assert image.value_of_css_property("image-rendering") == "pixelated"
        assert image.size == {"width": 146, "height": 182}  # each pixel is 2 × 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_stand_out(scheme: str, browser: webdriver.Chrome) -> None:
    show(browser, 1400, scheme)
    [body] = find(browser, "body")
    paper = luminance(body.value_of_css_property("background-color"))
    assert (paper > 0.5) == (scheme == "light")
    assert contrast(luminance(body.value_of_css_property("color")), paper) > 10
    for text in find(browser, "p, figcaption, summary"):
        assert contrast(luminance(text.value_of_css_property("color")), paper) > 4.5
    for line in find(browser, "svg .line"):
        assert contrast(luminance(line.value_of_css_property("stroke")), paper) > 3
    for number in range(7):
        name = f"getComputedStyle(document.documentElement).getPropertyValue('--c{number}')"
        color = browser.execute_script(f"return {name}").lstrip("#")
        rgb = ", ".join(str(int(color[i : i + 2], 16)) for i in (0, 2, 4))
        assert contrast(luminance(f"rgb({rgb})"), paper) > 3


def luminance(color: str) -> float:
    """The relative luminance of WCAG of a color such as rgb(0, 114, 178)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_a_page_of_many_runs_has_lines_of_different_styles(
    started: webdriver.Chrome, tmp_path: Path
) -> None:
    runs = read_runs([write_run(tmp_path / f"r{i}", lr=1e-4 * (i + 1)) for i in range(12)])
    path = tmp_path / "report.html"
    path.write_bytes(page(runs))
    started.get(path.as_uri())
    figure = find(started, "figure.plot")[0]
    styles = [
        (line.value_of_css_property("stroke"), line.value_of_css_property("stroke-dasharray"))
        for line in find(figure, "g:not(.teacher) > .line")
    ]
    assert len(styles) == len(set(styles)) == 12
