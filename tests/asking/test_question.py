"""A question, its client and its pictures are refused, or read, before a model is loaded."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from fedvlm_jax.asking.question import MOST_CHARACTERS, check_question, look_at, make_table
from fedvlm_jax.cli.main import main
from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.reader import find_client


def draw(file, colour=(9, 90, 200), size=(8, 6)):
    Image.new("RGB", size, colour).save(file)
    return file


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("noto-dee", "there is no client 'noto-dee'; did you mean noto-de"),
        ("xyz", "there is no client 'xyz'; the run's are noto-de, noto-en"),
        (None, "say whose model: --client NAME; the run's clients are noto-de, noto-en"),
    ],
)
def test_an_unknown_client_is_told_with_those_that_there_are(name, told):
    with pytest.raises(UserError, match=told):
        find_client(name, ["noto-de", "noto-en"])
    assert find_client("noto-en", ["noto-de", "noto-en"]) == "noto-en"


def test_of_many_clients_a_few_are_listed():
    with pytest.raises(UserError, match=r"c11 and 988 more$"):
        find_client(None, [f"c{number}" for number in range(1000)])


def test_names_of_strangers_make_no_lines_of_a_message():
    hostile = ["a\nfedvlm: all is well", "\x1b[2J", "x" * 300]
    for asked in (None, "nobody", "x" * 299):
        with pytest.raises(UserError) as caught:
            find_client(asked, hostile)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400
    assert find_client(hostile[0], hostile) == hostile[0]


def test_a_question_says_something_and_not_a_book():
    assert check_question("  Was ist das?\n") == "Was ist das?"
    for text, told in ((" \n", "the question is empty"), ("x" * (MOST_CHARACTERS + 1), "20,001 characters; 20,000")):
        with pytest.raises(UserError, match=told):
            check_question(text)


def test_several_pictures_are_one_question_s(tmp_path):
    files = [draw(tmp_path / "a.png"), draw(tmp_path / "b.jpg")]
    shown = look_at(files)
    assert shown.rows == (tuple(map(str, files)),)
    assert [content[:2] for content in shown.contents] == [b"\x89P", b"\xff\xd8"]
    table = make_table("Alike?", shown, "yes", 100)
    assert (len(table), table.most_pictures, table.max_image_pixels) == (1, 2, 100)
    assert [table.read_image(0, place) for place in range(2)] == list(shown.contents)


def test_a_folder_asks_about_each_of_its_pictures(tmp_path):
    for name in ("b.png", "a.jpg"):
        draw(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    (tmp_path / "d.png").symlink_to(tmp_path.parent / "elsewhere.png")
    draw(tmp_path.parent / "elsewhere.png")
    shown = look_at([tmp_path])
    assert shown.rows == (("a.jpg",), ("b.png",))
    assert dict(shown.broken) == {"c.png": "broken or truncated image", "d.png": "leads out of the folder"}
    table = make_table("What?", shown, "yes", 100)
    assert table.read_image(1) == (tmp_path / "b.png").read_bytes()


def test_a_link_to_a_picture_is_the_user_s_own(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link.png").symlink_to(tmp_path / "a.png")
    assert look_at([tmp_path / "below" / "link.png"]).contents == ((tmp_path / "a.png").read_bytes(),)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lost.png"], "lost.png: there is no such file"),
        (["text.png"], "text.png: broken or truncated image"),
        (["large.png"], "large.png: image of more than 50 pixels"),
        (["empty"], "empty: no picture is in it"),
        (["broken"], r"broken: none of its 1 picture can be read \(broken or truncated image\)"),
        (["small.png", "empty"], "empty is a folder, about each picture of which is asked: give it alone"),
        (["small.png"] * 9, "9 pictures of one question; 8 are the most"),
        (["pipe"], "pipe: it is no file"),
    ],
)
def test_pictures_that_cannot_be_are_told(given, told, tmp_path):
    draw(tmp_path / "small.png", size=(2, 2))
    draw(tmp_path / "large.png", size=(10, 10))
    (tmp_path / "text.png").write_text("text")
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "a.gif").write_bytes(b"GIF89a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=told):
        look_at([tmp_path / name for name in given], 50)


@pytest.fixture
def finished(tmp_path):
    """A folder that says it is a finished run's, of two clients; its model has gone."""
    from fedvlm_jax.config.run_options import Run, to_json
    from fedvlm_jax.run_dir.config_seal import seal

    folder = tmp_path / "run"
    folder.mkdir()
    resolved = {"wave": 1, "clients": ["noto-de", "noto-en"], "mesh": {"clients": 1}}
    content = {"run": to_json(Run(model=str(tmp_path / "gone"))), "resolved": resolved}
    content |= {"versions": {}, "fingerprint": {"data": "", "weights": "", "model_files": {}, "clients": {}}}
    (folder / "config.json").write_text(json.dumps(seal(content)))
    return folder


@pytest.mark.parametrize("command", ["ask", "demo"])
def test_runs_that_cannot_be_asked_are_told(command, finished, tmp_path, capsys):
    words = ["Was?"] if command == "ask" else []
    told = []
    for folder in (tmp_path / "nowhere", tmp_path, finished):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(folder), *words])
        assert stopped.value.code == 2
        told.append(capsys.readouterr().err)
    assert "no config.json there" in told[0]
    assert "no config.json there" in told[1]
    assert "is not finished; go on with: fedvlm train --resume" in told[2]
    (finished / "results.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([command, str(finished), *words])
    assert "gone, of which the run in" in capsys.readouterr().err


def test_what_is_wrong_is_told_before_jax_is_imported(finished, tmp_path):
    """Each in one line of its own process, which says what it has imported."""
    (finished / "results.json").write_text("{}")
    (tmp_path / "gone").mkdir()
    picture = str(draw(tmp_path / "a.png"))
    asked = {
        "did you mean noto-de": ["--client", "noto_de", "--image", picture, "What?"],
        "the question is empty": ["--client", "noto-de", "--image", picture, " "],
        "say about which picture": ["--client", "noto-de", "What?"],
        "there is no such file": ["--client", "noto-de", "--image", "lost.png", "What?"],
    }
    program = (
        "import json, sys\nfrom fedvlm_jax.cli.main import main\n"
        "for words in json.loads(sys.argv[1]):\n    try:\n        main(words)\n    except SystemExit as stop:\n"
        "        assert stop.code == 2, stop.code\n"
        "assert not {'jax', 'transformers'} & set(sys.modules)"
    )
    words = json.dumps([["ask", str(finished), *each] for each in asked.values()])
    done = subprocess.run([sys.executable, "-c", program, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(asked)
    for told, line in zip(asked, lines, strict=True):
        assert told in line
