"""The HTML report in headless Chromium."""

import shutil

import pytest
from report_folders import make_result, write

from latent_ae.evaluation.report import write_report

selenium = pytest.importorskip("selenium", reason="needs selenium (the test extra)")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    hostile = "<script>console.error('run')</script>.jpg"
    for seed, name in enumerate(("first", "second-model-with-a-rather-long-name" * 2)):
        content = make_result(root / str(seed), name, seed=seed, number=3, channels=8)
        content["data"]["skipped"] = [{"key": hostile, "reason": "a-long-word" * 20}]
        content["pictures"]["shown"][1]["key"] = hostile
        write(root / str(seed), content)
    return write_report([root / "0", root / "1"], root / "report.html").as_uri()


@pytest.fixture
def page(browser, url):
    """Opens the report at a width, in light or dark; there must be no error at the end."""

    def open_page(width=1280, scheme="light"):
        command = browser.execute_cdp_cmd
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        command("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        command("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(url)
        return browser

    yield open_page
    assert browser.get_log("browser") == []


def clip(browser, place=0):
    script = "return getComputedStyle(document.querySelectorAll('.over')[arguments[0]]).clipPath"
    return browser.execute_script(script, place)


def test_every_picture_is_there(page):
    missing = page().execute_script(
        "return [...document.images].filter(i => !i.complete || i.naturalWidth < 2).length"
    )
    assert missing == 0


def test_arrow_keys_move_the_clip_of_all_models(page):
    browser = page()
    assert clip(browser) == "inset(0px 0px 0px 50%)"
    slider = browser.find_element(By.CSS_SELECTOR, "#pictures input[type=range]")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    # The second slider is the other model's of the same picture, the third is another picture's.
    assert [clip(browser, place) for place in range(3)] == [
        "inset(0px 0px 0px 52%)",
        "inset(0px 0px 0px 52%)",
        "inset(0px 0px 0px 50%)",
    ]
    slider.send_keys(Keys.HOME)
    assert clip(browser) == "inset(0px 0px 0px 0%)"


def test_the_pointer_moves_the_line_to_where_it_is(page):
    browser = page()
    slider = browser.find_element(By.CSS_SELECTOR, "#pictures input[type=range]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    offset = slider.size["width"] // 4
    webdriver.ActionChains(browser).move_to_element_with_offset(slider, offset, 0).click().perform()
    assert 73 <= int(slider.get_attribute("value")) <= 77


def test_the_error_view_shows_the_difference(page):
    browser = page()
    browser.find_element(By.CSS_SELECTOR, "#pictures [data-view=error]").send_keys(Keys.ENTER)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.execute_script(style, "#pictures .over", "mixBlendMode") == "difference"
    assert browser.execute_script(style, "#pictures .stack", "filter") == "brightness(4)"
    assert browser.execute_script(style, "#worst .over", "mixBlendMode") == "normal"
    browser.find_element(By.CSS_SELECTOR, "#pictures [data-view=slider]").click()
    assert browser.execute_script(style, "#pictures .over", "mixBlendMode") == "normal"


def test_full_size_opens_zooms_and_gives_the_focus_back(page):
    browser = page()
    button = browser.find_element(By.CSS_SELECTOR, "[data-full]")
    button.send_keys(Keys.ENTER)
    frame = browser.find_element(By.CSS_SELECTOR, "dialog .frame")
    assert frame.size["width"] == 32
    browser.find_element(By.CSS_SELECTOR, "[data-zoom='4']").send_keys(Keys.ENTER)
    assert frame.size["width"] == 128
    browser.find_element(By.CSS_SELECTOR, "dialog input").send_keys(Keys.ARROW_RIGHT)
    assert (
        frame.find_element(By.CSS_SELECTOR, ".over")
        .value_of_css_property("clip-path")
        .endswith("51%)")
    )
    webdriver.ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not browser.find_element(By.CSS_SELECTOR, "dialog").is_displayed()
    assert browser.switch_to.active_element == button


LUMINANCE = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const light = (colour) => {
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const part = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
};
const paper = light(getComputedStyle(document.body).backgroundColor);
const contrast = (colour) => {
  const [low, high] = [paper, light(colour)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const found = {paper};
for (const selector of ['body', '.small', '.flag', 'nav a', '.references td', 'caption']) {
  found[selector] = contrast(getComputedStyle(document.querySelector(selector)).color);
}
for (const selector of ['svg .tick', 'svg .label', 'svg .note', 'svg .bar']) {
  found[selector] = contrast(getComputedStyle(document.querySelector(selector)).fill);
}
return found;
"""


@pytest.mark.parametrize(("scheme", "toggles"), [("light", 0), ("dark", 0), ("light", 2)])
def test_light_and_dark_are_both_legible(page, scheme, toggles):
    browser = page(scheme=scheme)
    for _ in range(toggles):
        browser.find_element(By.ID, "theme").send_keys(Keys.ENTER)
    found = browser.execute_script(LUMINANCE)
    paper = found.pop("paper")
    assert paper > 0.9 if scheme == "light" and not toggles else paper < 0.05
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_never_scrolls_sideways(page, width):
    browser = page(width)
    browser.execute_script(
        "for (const one of document.querySelectorAll('details')) one.open = true"
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_tab_reaches_everything_with_a_visible_focus(page):
    browser = page()
    wanted = browser.execute_script(
        "const all = [...document.querySelectorAll("
        "'a[href], button, input, summary, [tabindex=\"0\"]')]"
        ".filter(one => !one.closest('dialog'));"
        "all.forEach((one, place) => { one.dataset.place = place; }); return all.length"
    )
    look = (
        "const one = document.activeElement, style = getComputedStyle(one);"
        "return [one.dataset.place, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth)"
        " >= 2, one.getBoundingClientRect().width]"
    )
    reached = []
    for _ in range(wanted):
        webdriver.ActionChains(browser, duration=0).send_keys(Keys.TAB).perform()
        place, outlined, width = browser.execute_script(look)
        assert outlined, f"element {place} shows no focus"
        assert width > 0
        reached.append(int(place))
    assert reached == list(range(wanted))
