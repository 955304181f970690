"""HTML pages in a real browser. The study's: clicked through, left half-way, saved, sent, tallied.

Skipped where there is no Chromium with its driver: `apt-get install chromium chromium-driver`.
"""
import json
import shutil
import time
from contextlib import contextmanager

import pytest
from conftest import call
from test_report import fake_result
from test_study import GROUPS, data_of, inputs, made, server

import disk
from pages import report, study

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER),
                                reason="no Chromium or no chromedriver on the path")
TOTAL = GROUPS + 3      # questions of the study


@contextmanager
def browser(tmp_path, width=1280, height=900, phone=False):
    """A headless Chromium of its own, whose downloads go to tmp_path/downloads."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 f"--window-size={width},{height}", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(word)
    downloads = {"download.default_directory": str(tmp_path / "downloads")}
    options.add_experimental_option("prefs", downloads)
    if phone:
        screen = {"width": width, "height": height, "pixelRatio": 3.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
        loud = [entry["message"] for entry in driver.get_log("browser")
                if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]
        assert not loud         # no error of the script, nothing that the page's policy forbids
    finally:
        driver.quit()


def part(driver, name):
    """The element of this id."""
    return driver.find_element("id", name)


def wait_for(found, seconds=10):
    """The first true value of found(). Raises AssertionError after some seconds."""
    end = time.time() + seconds
    while time.time() < end:
        value = found()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def begin(driver, url, name):
    """Open the page and start as this evaluator."""
    driver.get(url)
    part(driver, "name").send_keys(name)
    driver.find_element("css selector", "#begin button").click()
    assert part(driver, "ask").is_displayed()


def shown(driver, data):
    """The question that is shown, found by its images."""
    source = part(driver, "left").find_element("tag name", "img").get_attribute("src")
    return next(q for q in data["questions"] if q["left"] == source)


def press(driver, word):
    """Press a key, at least as long after the question appeared as the page asks for."""
    from selenium.webdriver import ActionChains
    time.sleep(0.27)
    ActionChains(driver).send_keys(word).perform()


def click(driver, name):
    """Click on an element, at least as long after the question appeared as the page asks for."""
    time.sleep(0.27)
    part(driver, name).click()


def choose_all(driver, side):
    """Choose one side in all questions, without waiting."""
    driver.execute_script(f"state.order.forEach(() => {{ shownAt = -1e6; choose('{side}'); }})")
    assert part(driver, "end").is_displayed()


def number(driver):
    """The number of the question that is shown."""
    return int(part(driver, "count").text.split()[0])


def test_a_whole_study(made, tmp_path):
    """By clicks and keys, with a way back and a reload half-way; saved, and tallied."""
    from selenium.webdriver import Keys
    key = disk.read_json(made / "key.json")
    data = data_of(made)
    ways = [lambda d, side: click(d, side),
            lambda d, side: press(d, Keys.ARROW_LEFT if side == "left" else Keys.ARROW_RIGHT),
            lambda d, side: press(d, "1" if side == "left" else "2")]
    chosen = {}
    with browser(tmp_path) as driver:
        begin(driver, (made / "study.html").as_uri(), "Ana")
        for i in range(TOTAL):
            assert number(driver) == i + 1
            question = shown(driver, data)
            assert len(driver.find_elements("css selector", "#real img")) == 10
            said = key["questions"][question["id"]]
            wanted = {said[side]: side for side in study.SIDES}
            chosen[question["id"]] = wanted.get("real") or wanted["b"]
            ways[i % 3](driver, chosen[question["id"]])
            if i == 2:
                back_and_forth(driver, data, question, chosen[question["id"]])
            if i == 4:
                driver.refresh()
        assert part(driver, "end").is_displayed() and not part(driver, "send").is_displayed()
        part(driver, "save").click()
        file = wait_for(lambda: next((tmp_path / "downloads").glob("*.json"), None))
        assert file.name in part(driver, "said").text
    answers = disk.read_json(file)
    assert {a["question"]: a["side"] for a in answers["answers"]} == chosen
    assert answers["evaluator"]["name"] == "Ana" and answers["begun"] < answers["ended"]
    assert all(0.25 <= a["seconds"] < 30 for a in answers["answers"])
    call(study.main, "tally", file, "--key", made / "key.json", "--out", tmp_path / "tally")
    ana, = disk.read_json(tmp_path / "tally" / "tally.json")["evaluators"]
    assert (ana["a"], ana["b"], ana["passed"], ana["name"]) == (0, GROUPS, 3, "Ana")


def back_and_forth(driver, data, question, side):
    """From the question after this one back to it: its choice is shown, changed and put right."""
    from selenium.webdriver import Keys
    n = number(driver)
    press(driver, Keys.BACKSPACE)
    assert number(driver) == n - 1 and shown(driver, data) == question
    other = study.SIDES[side == "left"]
    assert part(driver, side).get_attribute("aria-pressed") == "true"
    assert part(driver, other).get_attribute("aria-pressed") == "false"
    click(driver, other)
    click(driver, "back")
    assert part(driver, other).get_attribute("aria-pressed") == "true"
    click(driver, side)
    click(driver, "back")
    part(driver, "forward").click()
    assert number(driver) == n and not part(driver, "forward").is_enabled()


def test_what_is_no_choice(made, tmp_path):
    """The second click of a double click, and a key together with Alt, which is the browser's."""
    from selenium.webdriver import ActionChains, Keys
    with browser(tmp_path) as driver:
        begin(driver, (made / "study.html").as_uri(), "")
        time.sleep(0.3)
        ActionChains(driver).double_click(part(driver, "left")).perform()
        assert number(driver) == 2
        time.sleep(0.3)
        driver.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', "
                              "{key: 'ArrowRight', altKey: true}))")
        driver.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', "
                              "{key: 'ArrowRight', repeat: true}))")
        assert number(driver) == 2
        press(driver, Keys.ARROW_RIGHT)
        assert number(driver) == 3


def test_orders_differ_between_people(made, tmp_path):
    """Another person at the same browser gets a new id and another order; the same questions."""
    found = []
    with browser(tmp_path) as driver:
        for name in "AB":
            begin(driver, (made / "study.html").as_uri(), name)
            choose_all(driver, "left")
            found.append(json.loads(driver.execute_script("return JSON.stringify(answers())")))
            part(driver, "save").click()
            part(driver, "another").click()
            assert part(driver, "start").is_displayed()
    orders = [[a["question"] for a in answers["answers"]] for answers in found]
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])
    assert found[0]["evaluator"]["id"] != found[1]["evaluator"]["id"]


def test_answers_are_sent_to_serve(server, tmp_path):
    """From the page that serve gives; where serve has gone, they can still be saved."""
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    with browser(tmp_path) as driver:
        begin(driver, url, "Ana")
        choose_all(driver, "right")
        part(driver, "send").click()
        wait_for(lambda: part(driver, "said").text == "Sent.")
        assert not part(driver, "send").is_displayed()
        assert not part(driver, "revise").is_displayed()
    path, = server.folder.iterdir()
    answers = disk.read_json(path)
    assert study.what_is_wrong(answers, server.key) is None
    assert {a["side"] for a in answers["answers"]} == {"right"}


def test_a_refusal_of_serve_is_shown(server, tmp_path):
    """Where answers cannot be kept, the page says so and still saves them."""
    server.key = {**server.key, "study": "0" * 16}
    with browser(tmp_path) as driver:
        begin(driver, f"http://127.0.0.1:{server.server_address[1]}/", "Ana")
        choose_all(driver, "right")
        part(driver, "send").click()
        wait_for(lambda: "could not be sent" in part(driver, "said").text)
        driver.get_log("browser")       # the browser itself notes the status 400 there
        part(driver, "save").click()
        wait_for(lambda: next((tmp_path / "downloads").glob("*.json"), None))


@pytest.mark.parametrize("width, height, phone", [(390, 844, True), (390, 600, True),
                                                  (1280, 800, False)])
def test_a_question_fits_the_screen(made, tmp_path, width, height, phone):
    """No scrolling, on a phone neither; images enlarged by whole numbers, large enough to touch."""
    with browser(tmp_path, width, height, phone) as driver:
        begin(driver, (made / "study.html").as_uri(), "")
        sizes = driver.execute_script(
            "const e = document.documentElement;"
            "return [e.scrollWidth - innerWidth, e.scrollHeight - innerHeight, devicePixelRatio]")
        assert sizes[0] <= 0 and sizes[1] <= 0
        for selector, least in (("#real img", 50), ("#pair img", 130)):
            for image in driver.find_elements("css selector", selector):
                side, height = driver.execute_script(
                    "const box = arguments[0].getBoundingClientRect();"
                    "return [box.width, box.height]", image)
                times = side * sizes[2] / 8
                assert abs(side - height) < 0.1 and side >= least
                assert abs(times - round(times)) < 0.05
                assert image.value_of_css_property("image-rendering") == "pixelated"
                assert image.get_attribute("alt")
        smooth = driver.execute_script(     # as of 256 pixels
            "study.size = 256; fit(); const image = document.querySelector('#left img');"
            "return [image.width / image.parentElement.clientWidth, image.style.imageRendering]")
        assert smooth[0] > 0.9 and (smooth[1] == "auto" or not phone)
        for button in driver.find_elements("css selector", "#ask button"):
            assert button.rect["height"] >= 44 and button.accessible_name


def colours(driver):
    """{element: (its text's colour, the colour behind it)} as rgb triples."""
    return driver.execute_script("""
        const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const behind = (e) => getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)" &&
            e.parentElement ? behind(e.parentElement) : getComputedStyle(e).backgroundColor;
        const found = {};
        for (const e of document.querySelectorAll("h1, h2, p, li, label, span, button, kbd"))
            if (e.innerText && !e.disabled)
                found[e.tagName + e.id + e.className] = [rgb(getComputedStyle(e).color),
                                                         rgb(behind(e))];
        return found;""")


def luminance(rgb):
    """WCAG's relative luminance."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(made, tmp_path, scheme):
    """A contrast of at least 4.5 to 1, light and dark."""
    with browser(tmp_path) as driver:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})
        driver.get((made / "study.html").as_uri())
        found = colours(driver)
        begin(driver, (made / "study.html").as_uri(), "")
        found |= colours(driver)
    assert len(found) > 10
    for what, pair in found.items():
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, what


# --------------------------------------------------------------------------------------------------
# The report's page

def column(driver, k):
    """The texts of one column of the first table."""
    cells = driver.find_elements("css selector", f"main tbody tr > :nth-child({k})")
    return [cell.text for cell in cells]


def test_a_report_sorts_explains_and_enlarges(tmp_path):
    """By clicks: a column sorts up, then down; a number shows its row's settings; a picture opens.
    """
    rows = []
    for name, fid in (("DDPM", 10.0), ("OC", 9.5), ("X + CM", 100.0)):
        disk.write_json(tmp_path / f"{name}.json", fake_result(fid, 7))
        rows += ["--row", f"{name}={tmp_path / name}.json"]
    call(report.main, "--paper", "table2", "--setting", "none", *rows, "--out", tmp_path / "r.md")
    with browser(tmp_path, 390, 844, phone=True) as driver:
        driver.get((tmp_path / "r.html").as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        title = driver.find_elements("css selector", "thead button")[2]
        assert title.text.split()[0] == "FID"
        for order in (["OC", "DDPM", "X + CM"], ["X + CM", "DDPM", "OC"]):
            title.click()
            assert column(driver, 1) == order
        driver.find_elements("css selector", "main td button")[1].click()
        assert part(driver, "more-title").text == "X + CM: FID 100.000"
        said = dict(line.split(" ", 1) for line in part(driver, "more").text.splitlines()
                    if " " in line)
        assert said["command"] == "python train.py --seed 7" and said["guidance"] == "1.5"
        driver.find_element("css selector", "#more button").click()
        figure = driver.find_element("css selector", ".figure img")
        small = figure.size["width"]
        figure.click()
        large = driver.find_element("css selector", "#more img")
        assert large.size["width"] > small and large.get_attribute("alt") == "the table as bars"
