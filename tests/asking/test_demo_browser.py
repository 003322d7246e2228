"""The page of `fedvlm demo` in a real browser, with a real run: by keyboard, by dropping a picture, on a phone."""

import json
import re
import signal
import subprocess
import sys

import pytest
from tiny_run import tiny_run
from web_driver import ENTER, SPACE, TAB, find_browser, open_browser

from fedvlm_jax.config.run_options import EvaluationOptions, TrainOptions
from fedvlm_jax.training import federated_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_browser()[0], reason=find_browser()[2])]
ANSWERS = (
    "return document.querySelectorAll('.answers article').length === 3 && !document.getElementById('results').hidden"
)
FAULT = "return !document.getElementById('fault').hidden && document.getElementById('fault').textContent"
READY = "return document.querySelectorAll('#samples button img').length"
WIDTH = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(model, loaded, tmp_path_factory):
    """The address of a page that the command serves, on a port that is free."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train = TrainOptions(rounds=1, local_steps=2, batch_size=4)
    evaluation = EvaluationOptions(every=2, max_answer_tokens=4, batch_size=6, examples=0)
    federated_run.train(tiny_run(model, folder, train=train, evaluation=evaluation), model=loaded)
    words = [sys.executable, "-m", "fedvlm_jax", "demo", str(folder), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as started:
        line = started.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 130


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def at(browser, page):
    browser.resize(1200, 800)
    browser.open(page)
    browser.wait(READY)
    return browser


def read_focus(browser):
    return browser.run("return document.activeElement.id || document.activeElement.tagName")


def test_by_keyboard_alone(at):
    """Client, picture, samples, question, button: in that order; a sample brings its question."""
    at.press(TAB)
    assert read_focus(at) == "client"
    at.press(TAB)
    assert read_focus(at) == "file"
    at.press(TAB, SPACE)
    assert at.run("return document.activeElement.getAttribute('aria-pressed')") == "true"
    question = at.run("return document.getElementById('question').value")
    assert question
    at.run("document.getElementById('question').focus()")
    at.press(ENTER)
    at.wait(ANSWERS)
    assert at.text("#asked") == question
    models = at.run("return [...document.querySelectorAll('.answers h3')].map((each) => each.textContent)")
    assert models == ["zero-shot", "global model", "personal model"]
    assert "noto-en" in at.text("#whose")
    assert "right answer: " in at.text("#whose")
    at.run("document.getElementById('question').focus()")
    at.press(TAB)
    assert read_focus(at) == "ask"


def test_a_chosen_file_and_another_client(at, tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 30), (200, 10, 10)).save(tmp_path / "red.png")
    at.run("const s = document.getElementById('client'); s.value = 'fluent-de'; s.dispatchEvent(new Event('change'))")
    at.type("#file", str(tmp_path / "red.png"))
    at.type("#question", "Was ist das?" + ENTER)
    at.wait(ANSWERS)
    assert "fluent-de" in at.text("#whose")
    assert "right answer" not in at.text("#whose")
    assert at.run("return document.querySelector('#about img').naturalWidth") == 30


DROP = """
const data = new DataTransfer(), bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
data.items.add(new File([bytes], arguments[1]));
const about = {dataTransfer: data, bubbles: true, cancelable: true};
document.getElementById('drop').dispatchEvent(new DragEvent('drop', about));
"""


def test_a_dropped_file_that_is_no_picture_is_told_in_a_line(at):
    at.run(DROP, "bm8gcGljdHVyZQ==", "cat.png")
    assert "cat.png" in at.text("#shown")
    at.type("#question", "What?" + ENTER)
    assert at.wait(FAULT) == "the picture: broken or truncated image"
    assert at.run("return document.getElementById('fault').getAttribute('role')") == "alert"
    assert at.run("return document.getElementById('results').hidden")


def test_what_is_missing_is_told_without_asking(at):
    at.run("document.getElementById('ask').click()")
    assert at.wait(FAULT) == "Choose a picture first."
    assert read_focus(at) == "file"
    at.run(DROP, "bm8gcGljdHVyZQ==", "cat.png")
    at.run("document.getElementById('ask').click()")
    at.wait("return document.getElementById('fault').textContent === 'Write a question first.'")
    assert read_focus(at) == "question"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_fits_and_can_be_read(at, width, dark):
    """Nothing is wider than the screen, and text stands out from its ground as WCAG asks: 4.5 to 1."""
    at.run("document.querySelector('#samples button').click(); document.getElementById('ask').click()")
    at.wait(ANSWERS)
    at.run(DROP, "bm8gcGljdHVyZQ==", "a-very-long-name-" * 12 + ".png")
    at.resize(width, 800, dark=dark)
    assert at.run(WIDTH) == 0
    contrast = """
    const luminance = (colour) => {
      const [r, g, b] = colour.match(/[\\d.]+/g).map((each) => each / 255)
        .map((each) => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
      for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$|transparent/.test(colour)) return colour;
      }
      return "rgb(255, 255, 255)";
    };
    return ["h1", ".sub", "label", "#hint", "#ask", "#asked", "#whose", ".answers h3", ".answers p", "select"]
      .map((css) => {
        const node = document.querySelector(css);
        const [low, high] = [getComputedStyle(node).color, ground(node)].map(luminance).sort((a, b) => a - b);
        return [css, (high + 0.05) / (low + 0.05)];
      }).filter(([, ratio]) => ratio < 4.5);
    """
    assert at.run(contrast) == []


def test_every_control_has_a_name(at):
    nodes = at.devtools("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if node.get("role", {}).get("value") in ("button", "combobox", "textbox")]
    names = [node["name"]["value"] for node in controls]
    assert all(names)
    assert {"Client", "Question", "Ask"} <= set(names)
    assert any(name.startswith("Picture") for name in names)
    assert any(name.startswith("Test picture 1: ") for name in names)


def test_nothing_is_asked_of_other_hosts_and_no_line_is_blocked(browser, page):
    """Last: by all requests that the tests before it have made."""
    logged = [json.loads(entry["message"])["message"] for entry in browser.call("POST", "/se/log", type="performance")]
    asked = {entry["params"]["request"]["url"] for entry in logged if entry["method"] == "Network.requestWillBeSent"}
    assert f"{page}ask" in asked
    network = {url for url in asked if url.startswith(("http", "ws"))}  # the first tab has pictures of its own
    assert {url for url in network if not url.startswith(page)} == set()
    assert [line for line in browser.logs() if "Content Security Policy" in line] == []
