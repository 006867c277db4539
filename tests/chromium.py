"""A real Chromium without a window, for pages that are files."""

import base64
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--window-size=1280,1000",
)  # fmt: skip


def require_chromium():
    """Skip where there is no Chromium; on CI its absence is a failure."""
    missing = [path for path in (CHROMIUM, DRIVER) if not Path(path).exists()]
    if missing:
        reason = f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


class Browser:
    """Opens pages, and speaks in the words of the tests."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1280, height=1000, dark=False):
        self.set_screen(width, height, dark=dark)
        self.driver.get(path.absolute().as_uri())
        self.wait_until("return document.documentElement.dataset.ready === 'true'")

    def set_screen(self, width, height, *, dark=False):
        send = self.driver.execute_cdp_cmd
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        send("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def wait_until(self, script, seconds=20):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, 0.05).until(
            lambda driver: driver.execute_script(script)
        )

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            actions.send_keys(key)
        actions.perform()

    def hover(self, element, x, y):
        """Point at a place, counted in shares of an element from its upper left corner."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        width, height = element.size["width"], element.size["height"]
        ActionChains(self.driver, duration=0).move_to_element_with_offset(
            element, round((x - 0.5) * width), round((y - 0.5) * height)
        ).perform()

    def errors(self):
        """What the console and the network complained about since the last call."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        # the tests read canvases again and again
        return [message for message in messages if "willReadFrequently" not in message]

    def screenshot(self):
        answer = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True}
        )
        return base64.b64decode(answer["data"])


@contextmanager
def start_browser(folder):
    """Start a browser with an empty profile in a folder, and end it."""
    require_chromium()
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER, env={**os.environ, "NO_PROXY": "127.0.0.1,localhost"})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
        shutil.rmtree(folder / "profile", ignore_errors=True)
