"""A browser for tests: Chromium by its driver's own protocol (W3C WebDriver), which is JSON over HTTP."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

KEY = "element-6066-11e4-a52e-4f735466cecf"  # by which the protocol names an element
TAB, ENTER, SPACE = "\ue004", "\ue007", " "


def find_browser():
    """The paths of Chromium and its driver, or why there is no browser."""
    driver = shutil.which("chromedriver")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if driver and browser:
        return driver, browser, ""
    return "", "", "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"


class Browser:
    def __init__(self, url):
        self.url = url

    def call(self, method, path, **content):
        data = json.dumps(content).encode() if method == "POST" else None
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def open(self, url):
        self.call("POST", "/url", url=url)

    def run(self, script, *args):
        return self.call("POST", "/execute/sync", script=script, args=list(args))

    def find(self, css):
        return self.call("POST", "/element", using="css selector", value=css)[KEY]

    def text(self, css):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def type(self, css, text):
        self.call("POST", f"/element/{self.find(css)}/value", text=text)

    def press(self, *keys):
        """Press keys wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def wait(self, script, seconds=60):
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} did not come true; the page says {self.text('main')}"
            time.sleep(0.1)
        return found

    def resize(self, width, height, *, dark=False):
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def devtools(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def picture(self, file):
        size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": size["height"]}
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def logs(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser")]


@contextmanager
def open_browser(folder):
    """Start a browser without a window, with a profile of its own in a folder."""
    driver, browser, why = find_browser()
    assert not why, why
    with (folder / "driver.log").open("wb") as log:
        started = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = next(line for line in started.stdout if "started successfully on port" in line)
        port = line.rsplit("port ", 1)[1].strip(" .\n")
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"]
        arguments += [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking"]
        wanted = {
            "goog:chromeOptions": {"binary": browser, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = Browser(f"http://127.0.0.1:{port}")
        opened = session.call("POST", "/session", capabilities={"alwaysMatch": wanted})
        session.url += f"/session/{opened['sessionId']}"
        try:
            yield session
        finally:
            session.call("DELETE", "")
    finally:
        started.terminate()
        started.wait(10)
