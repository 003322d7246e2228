"""`fedvlm deploy init` and `fedvlm node`: the folder that is written, and what is refused before long work."""

import ast
import json
import re
import shlex
import stat
import tomllib

import pytest
from deployment_world import write_rows
from models import causal_cases

from fedvlm_jax.cli import deploy, main
from fedvlm_jax.cli import node as node_command
from fedvlm_jax.cli.main import main as fedvlm
from fedvlm_jax.deployment.flower.app_folder import describe_supernode
from fedvlm_jax.deployment.plan import read_node_file, read_plan
from fedvlm_jax.deployment.worker import open_worker
from fedvlm_jax.errors import UserError


def init(folder, model, *words):
    fedvlm(["deploy", "init", str(folder), "--clients", "3", "--model", str(model), *words])


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "two words"
    init(folder, model, "--rounds", "7", "--port", "8123", "--method", "ditto", "--method.lambda", "2", "--at-least",
         "2", "--timeout", "600", "--data.max-answer-tokens", "9")  # fmt: skip
    return folder


def test_the_app_is_flower_s(written):
    app = written / "app"
    project = tomllib.loads((app / "pyproject.toml").read_text())
    about = project["tool"]["flwr"]["app"]
    assert about["config"] == {"out": str(written / "run"), "model": ""}
    assert project["project"]["dependencies"] == []
    for name, make in {"serverapp": "make_server_app", "clientapp": "make_client_app"}.items():
        module, _, variable = about["components"][name].partition(":")
        text = (app / (module.replace(".", "/") + ".py")).read_text()
        assert make in text
        assert variable in {node.targets[0].id for node in ast.parse(text).body if isinstance(node, ast.Assign)}
    connections = tomllib.loads((written / "flwr" / "config.toml").read_text())["superlink"]
    assert connections[connections["default"]] == {"address": "127.0.0.1:8123", "insecure": True}
    assert connections["tls"]["root-certificates"] == str(written / "certificates" / "ca.crt")


def test_the_plan_says_what_was_asked_for_and_holds_no_secret(written):
    plan = read_plan(written / "app" / "fedvlm_app" / "plan.json")
    assert (plan.clients, plan.least, plan.timeout, plan.run.train.rounds) == (3, 2, 600.0, 7)
    assert plan.run.method_options.lambda_ == 2
    assert plan.run.data.max_answer_tokens == 9
    texts = "".join(path.read_text() for path in written.rglob("*") if path.is_file() and path.parent.name != "nodes")
    nodes = [read_node_file(written / "nodes" / f"client-{number}.json") for number in range(3)]
    assert [node.number for node in nodes] == [0, 1, 2]
    assert len({node.token for node in nodes}) == 3
    for node in nodes:
        assert node.plan == plan
        assert node.port == 8123
        assert node.token not in texts


def test_a_node_s_file_is_for_its_owner_alone(written):
    assert stat.S_IMODE((written / "nodes").stat().st_mode) == 0o700
    files = list((written / "nodes").iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_commands_of_its_text_are_ours_and_flower_s(written, monkeypatch):
    text = (written / "README.md").read_text()
    assert "$" not in text
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line.partition(" #")[0]) for line in blocks.splitlines()]
    programs = {words[0] for words in commands if words}
    assert {"fedvlm", "flower-superlink", "flower-supernode", "openssl", "ssh-keygen"} <= programs
    asked = []
    monkeypatch.setattr(main, "_check_and_run", lambda command, args, kwargs: asked.append((command, kwargs)))
    ours = [words[1:] for words in commands if words and words[0] == "fedvlm"]
    for words in ours:
        main._dispatch([word for word in words if word != "..."])
    assert len(asked) == len(ours) == 2
    assert str(written / "nodes" / "client-0.json") in ours[0]
    runs = [words for words in commands if "flwr" in words]
    assert {words[0] for words in runs} == {f"FLWR_HOME={written / 'flwr'}"}
    assert {words[3] for words in runs if words[2] == "run"} == {str(written / "app")}


def test_the_short_help_has_what_is_a_deployment_s_own(capsys):
    with pytest.raises(SystemExit):
        fedvlm(["deploy", "--help"])
    shown = capsys.readouterr().out
    assert "--help-all lists" in shown
    for flag in ("--clients", "--at-least", "--classes", "--timeout", "--secure", "--port", "--out"):
        assert f"\n  {flag} " in shown or f"\n  {flag}\n" in shown


NOT_THERE = [
    ("--start", "folder"), ("--train.finetune-steps", "2"), ("--evaluation.clients", "2"),
    ("--evaluation.cross-clients",), ("--evaluation.cold-start", "mean"), ("--participation.dropout", "0.1"),
    ("--participation.stragglers", "0.1"), ("--participation.attack", "scale"), ("--participation.attackers", "1"),
    ("--messages.pool", "krum"), ("--messages.compress", "int8"), ("--messages.secure",), ("--privacy.noise", "1"),
    ("--privacy.epsilon", "8"), ("--audit.keep",),
]  # fmt: skip


@pytest.mark.parametrize("words", NOT_THERE, ids="".join)
def test_what_is_always_refused_is_not_listed(words, tmp_path, capsys):
    told = refuse(["deploy", "init", tmp_path / "new", "--clients", "3", *words], capsys)
    assert "not in a deployment" in told or "no such folder" in told
    assert words[0] in deploy.REFUSED


def test_a_node_scores_by_one_mix_of_rewards(tmp_path, capsys):
    words = ["--objective", "reward", "--preference.mix", "0.2", "0.8"]
    told = refuse(["deploy", "init", tmp_path / "new", "--clients", "3", *words], capsys)
    assert "--preference.mix: not in a deployment, for a node scores its model as the only client" in told


def test_a_node_has_no_file_of_rewards_and_no_others_answers(tmp_path, capsys):
    file = tmp_path / "rewards.csv"
    file.write_text("answer,reward\na bus,1\n")
    for words in (("file", "brevity", "--preference.reward-file", file), ("cider", "brevity")):
        words = ["--objective", "reward", "--preference.rewards", *map(str, words)]
        told = refuse(["deploy", "init", tmp_path / "new", "--clients", "3", *words], capsys)
        assert f"{'--preference.reward-file' if len(words) > 5 else '--preference.rewards cider'}: not in a dep" in told
    assert "--preference.reward-file" in deploy.REFUSED


@pytest.mark.parametrize("words", [("deploy", "init"), ("node",)])
def test_the_help_lists_what_can_be_given(words, capsys):
    with pytest.raises(SystemExit):
        fedvlm([*words, "--help-all"])
    shown = capsys.readouterr().out
    assert not [flag for flag in (deploy if len(words) > 1 else node_command).REFUSED if flag in shown]
    assert {flag for flag, *_ in NOT_THERE} < deploy.REFUSED
    assert "--participation.sampling" in shown or words == ("node",)
    assert "(default: emoji)" not in shown


def test_the_command_of_a_supernode_survives_a_shell():
    words = shlex.split(describe_supernode("/a dir/it's/w.sock", 2, 8123))
    assert words[:4] == ["flower-supernode", "--insecure", "--superlink", "127.0.0.1:8123"]
    assert tomllib.loads(words[-1]) == {"socket": "/a dir/it's/w.sock"}
    assert "9096" in words


def refuse(words, capsys):
    with pytest.raises(SystemExit) as stop:
        fedvlm(list(map(str, words)))
    said = capsys.readouterr()
    assert stop.value.code == 2, said
    assert said.err.count("fedvlm: ") == 1, said.err
    return said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--clients", "1"), "expected 2 to"),
        (("--clients", "3", "--cohort", "4"), "there are only 3 clients"),
        (("--clients", "3", "--method", "plorra"), "did you mean plora?"),
        (("--clients", "3", "--data", "x"), "Unrecognized options: --data"),
        (("--clients", "3", "--port", "0"), "--port is 0: it must be from 1 to 65535"),
        (("--clients", "3", "--timeout", "0"), "--timeout is 0.0: it must be above 0"),
        (("--clients", "3", "--train.finetune-steps", "2"), "not in a deployment"),
        (("--clients", "3", "--model", "./nowhere"), "there is no such folder"),
        (("--clients", "3", "--method", "flora", "--secure"), "--secure: the server of flora needs every client's"),
        (("--clients", "3", "--model", "clip-nano"), "clip-nano chooses among the answers of all clients' rows"),
        (("--clients", "3", "--model", "clip-nano", "--method", "promptfl"), "a class per line, --classes FILE"),
        (("--clients", "3", "--model", "clip-nano", "--novel-classes", __file__), "of --classes, which is missing"),
        (("--clients", "3", "--model", "clip-nano", "--classes", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--clients", "3", "--model", "clip-nano", "--classes", "/dev/zero"), "/dev/zero: no regular file"),
        (("--clients", "3", "--image-pixels", "4096"), "have no grids of their own: leave --image-pixels out"),
        (("--clients", "3", "--method", "pfit", "--method.layers", "nowhere"), "--method.layers 'nowhere' is found in"),
        ((), "--clients"),
    ],
)
def test_what_cannot_be_leaves_nothing(words, told, tmp_path, capsys):
    assert told in refuse(["deploy", "init", tmp_path / "new", *words], capsys)
    assert list(tmp_path.iterdir()) == []


CLASSES = {
    "": "line 1: there is no class",
    "cat\n\ndog\n": "line 2: there is no class",
    "cat\ndog\n\n": "line 3: there is no class",
    "cat\n\N{REPLACEMENT CHARACTER}\n": "line 2: there is no class",
    "cat\n cat\t\n": "line 2: 'cat' is there already (--classes, line 1)",
    "dog\n" + "\x1b[31m" + "x" * 301: f"line 2: '\\\\x1b[31m{'x' * 35}…' has 306 characters; expected 300 at most",
    "\n".join(map(str, range(4097))): "4,097 classes; expected 4,096 at most",
    "x\n" * 2**22 + "x\n": "more than 8,388,608 bytes",
    b"caf\xe9\n": "not UTF-8 at byte 3",
    "cat\n" + "a b " * 50: "cannot read 'a b a b a b a b a b a b a b a b a b a b …'",
    "cat\n<|endoftext|>\n": "cannot read '<|endoftext|>'",
}


@pytest.mark.parametrize("content", CLASSES, ids=[str(number) for number in range(len(CLASSES))])
def test_classes_that_cannot_be_are_refused(content, tmp_path, capsys):
    file = tmp_path / "classes.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["--clients", "3", "--model", "clip-nano", "--classes", file]
    told = refuse(["deploy", "init", tmp_path / "new", *words], capsys)
    assert CLASSES[content] in told
    assert "\x1b" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["classes.txt"]


def test_classes_are_one_or_the_other_kind_and_of_a_base_that_has_some(tmp_path, model, capsys):
    for name, text in {"a.txt": "cat\r\ndog", "b.txt": "emu\ncat\n"}.items():
        (tmp_path / name).write_text(text)
    words = ["deploy", "init", tmp_path / "new", "--clients", "3", "--classes", tmp_path / "a.txt"]
    both = [*words, "--model", "clip-nano", "--novel-classes", tmp_path / "b.txt"]
    assert "b.txt, line 2: 'cat' is there already (--classes, line 1)" in refuse(both, capsys)
    assert f"--classes: {model} writes its answers" in refuse([*words, "--model", model], capsys)
    assert not (tmp_path / "new").exists()


def test_a_plan_has_the_classes_and_what_stands_in_their_place(tmp_path):
    for name, text in {"a.txt": "\ufeffcat\r\n chow chow \r\n", "b.txt": "\N{SNOWMAN} emu"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    init(
        tmp_path / "new", "clip-nano", "--objective", "classify", "--method", "promptfl", "--prompt.vectors", "3",
        "--data.class-prompt", "{}, drawn", "--classes", str(tmp_path / "a.txt"), "--novel-classes",
        str(tmp_path / "b.txt"),
    )  # fmt: skip
    plan = read_plan(tmp_path / "new" / "app" / "fedvlm_app" / "plan.json")
    data = plan.run.data
    assert (data.agreed_classes, data.agreed_novel) == (("cat", "chow chow"), ("\N{SNOWMAN} emu",))
    assert (data.class_prompt, plan.run.soft_prompt.vectors) == ("{}, drawn", 3)
    file = tmp_path / "new" / "nodes" / "client-1.json"
    assert read_node_file(file).plan == plan
    edited = json.loads(file.read_text())
    edited["plan"]["run"]["data"]["agreed_classes"].reverse()
    file.write_text(json.dumps(edited))
    with pytest.raises(UserError, match="was it edited"):
        read_node_file(file)


def test_grids_of_their_own_that_no_node_could_make_are_refused(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    causal_cases.write_qwen3(model)
    (model / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # of which the plan has the digest alone
    words = ["deploy", "init", tmp_path / "new", "--clients", "3", "--model", model, "--image-pixels"]
    assert "--image-pixels 63: an image token alone has 64" in refuse([*words, "63"], capsys)
    told = refuse([*words, "1024", "--lora.targets", "vision_tower/.*qkv"], capsys)
    assert "--image-pixels needs a frozen tower" in told
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path, model, capsys):
    (tmp_path / "mine").write_text("x")
    told = refuse(["deploy", "init", tmp_path, "--clients", "3", "--model", model], capsys)
    assert "is not empty: choose another DIR" in told
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_node_that_cannot_be_is_refused_before_a_model_is_loaded(written, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written / "nodes" / "client-1.json"
    data = ("--data", "emoji")
    assert "say whose rows" in refuse(["node", file], capsys)
    assert "is the plan's" in refuse(["node", file, *data, "--data.max-answer-tokens", "3"], capsys)
    assert "is the plan's" in refuse(["node", file, *data, "--data.class-prompt", "{}"], capsys)
    assert "nowhere.json" in refuse(["node", "nowhere.json", *data], capsys)
    edited = json.loads(file.read_text()) | {"number": 2}
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    assert "its secret is not that of client 2" in refuse(["node", "edited.json", *data], capsys)
    long = tmp_path / ("x" * 100)
    assert "at most 103 bytes" in refuse(["node", file, *data, "--socket", long], capsys)
    with open_worker(tmp_path / "w.sock"):
        told = refuse(["node", file, *data, "--socket", tmp_path / "w.sock"], capsys)
    assert "a running `fedvlm node` has it" in told
    assert not list(tmp_path.glob("node-*"))


def test_a_node_that_is_refused_leaves_no_folder(written, tmp_path, capsys, monkeypatch):
    """One that held nothing but an owner and a lock had stayed, and looked like a node's."""
    rows = write_rows(tmp_path / "rows")
    monkeypatch.chdir(tmp_path)
    told = refuse(["node", written / "nodes" / "client-1.json", "--data", rows / "all", "--socket", "s/w"], capsys)
    assert "has 3 clients (ann, bob, cyd), and a node is one" in told
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
