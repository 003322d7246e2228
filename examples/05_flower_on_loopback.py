# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Real clients with Flower, on one machine
#
# A SuperLink, two SuperNodes and two `fedvlm node` beside them, each with rows that nobody else opens: two rounds of
# pLoRA over the loopback interface. It is what *Real clients* does on several machines, with a random model of a few
# thousand parameters. Without Flower (`pip install '.[flower]'` in a clone, in an environment of its own) only the
# deployment's folder is made.

# %%
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import jax
from PIL import Image
from transformers import BartConfig, Florence2Config

import fedvlm_jax
from fedvlm_jax.models import save_checkpoint
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.run_dir.reader import read_run

folder = Path(tempfile.mkdtemp(prefix="flower-"))
here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
here |= {"FLWR_HOME": str(folder / "d" / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
here |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # programs that run twice may be slow, and compile quickly


def run(*words):
    """Run a command to its end; return what it says."""
    done = subprocess.run([*map(str, words)], env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# %% [markdown]
# ## Rows of two clients
#
# A folder each, of pictures and a file of lines. One client names colours in English, the other in Norwegian.

# %%
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (240, 210, 60)}
WORDS = {"english": list(COLOURS), "norsk": ["rød", "grønn", "blå", "gul"]}
SPLITS = ["train"] * 8 + ["validation"] * 4 + ["test"] * 4

for name, words in WORDS.items():
    place = folder / name
    place.mkdir()
    lines = []
    for number, split in enumerate(SPLITS):
        word, colour = words[number % 4], list(COLOURS.values())[number % 4]
        Image.new("RGB", (32, 32), tuple(min(255, part + number) for part in colour)).save(place / f"{number}.png")
        about = {"question": "Which colour?", "chosen": word, "client": name, "split": split}
        lines.append(json.dumps({"image": f"{number}.png", **about}, ensure_ascii=False))
    (place / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
print((folder / "norsk" / "rows.jsonl").read_text(encoding="utf-8").partition("\n")[0])

# %% [markdown]
# ## A base
#
# Random weights in Florence-2's architecture, with the tokenizer that ships. Every machine must have the same files.

# %%
shipped = Path(fedvlm_jax.__file__).parent / "assets" / "florence2-nano"
model = folder / "model"
model.mkdir()
for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
    (model / name).write_bytes((shipped / name).read_bytes())
config = Florence2Config.from_pretrained(shipped)
text = BartConfig(
    vocab_size=config.text_config.vocab_size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    decoder_start_token_id=2, forced_eos_token_id=None, tie_word_embeddings=True,
)  # fmt: skip
vision = {
    "embed_dim": [8], "depths": [1], "num_heads": [2], "num_groups": [2], "patch_size": [16], "patch_stride": [16],
    "patch_padding": [0], "patch_prenorm": [False], "window_size": 4, "projection_dim": 16,
    "max_position_embeddings": 4, "max_temporal_embeddings": 1,
}  # fmt: skip
vlm = build(Florence2Config(text_config=text, vision_config=vision, image_token_id=config.image_token_id))
save_checkpoint(vlm, jax.jit(vlm.init)(jax.random.key(0)), model)

# %% [markdown]
# ## The deployment
#
# Three ports that are free; then Flower's app with the plan, and a secret file for each node.

# %%
with contextlib.ExitStack() as held:
    opened = [held.enter_context(socket.socket()) for _ in range(3)]
    for each in opened:
        each.bind(("127.0.0.1", 0))
    port, *node_ports = (each.getsockname()[1] for each in opened)

options = "--rounds 2 --train.local-steps 2 --train.batch-size 4 --rank 2 --evaluation.max-answer-tokens 4"
lengths = "--data.max-prompt-tokens 40 --data.max-answer-tokens 8"
fedvlm = (sys.executable, "-m", "fedvlm_jax")
made = run(
    *fedvlm, "deploy", "init", folder / "d", "--clients", 2, "--port", port, "--model", model, "--method", "plora",
    *options.split(), *lengths.split(),
)  # fmt: skip
print(made)

# %% [markdown]
# ## Two rounds
#
# Each node's worker loads the base and its rows once, and stays. The SuperNode beside it asks the SuperLink for orders
# and starts a small process for each, which hands it to the worker.


# %%
def start(running, name, *words, ready):
    """Start a process that ends with the block, and wait until it says that it is ready."""
    log = folder / f"{name}.log"
    with log.open("wb") as written:
        process = subprocess.Popen([*map(str, words)], env=here, stdout=written, stderr=subprocess.STDOUT)
    running.callback(end, process)
    wait_until(lambda: ready in log.read_text(encoding="utf-8"), log, process)


def end(process):
    """Ask a process to end, and kill it where it is inside of a compilation."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


def wait_until(done, log, process=None):
    """Wait, five minutes at most."""
    end = time.monotonic() + 300
    while not done():
        alive = process is None or process.poll() is None
        assert alive, log.read_text(encoding="utf-8")
        assert time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.2)


def train():
    """Run SuperLink, nodes and all rounds."""
    local = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--port")
    link = ("flower-superlink", "--insecure", "--port", port, "--disable-runtime-dependency-installation")
    link += ("--database", folder / "d" / "superlink.db")  # it knows its nodes when it is started again
    with contextlib.ExitStack() as running:
        start(running, "superlink", *link, ready="Uvicorn running")
        for number, (name, node_port) in enumerate(zip(WORDS, node_ports, strict=True)):
            worker, own = folder / f"node-{number}", folder / "d" / "nodes" / f"client-{number}.json"
            given = (own, "--data", folder / name, "--folder", worker)
            start(running, f"node-{number}", *fedvlm, "node", *given, ready="beside")
            config = f'socket="{worker}/worker.sock"'
            supernode = ("flower-supernode", *local, node_port, "--node-config", config)
            start(running, f"supernode-{number}", *supernode, ready="Uvicorn running")
        print(run("flwr", "run", folder / "d" / "app", "plain"))
        wait_until((folder / "d" / "run" / "results.json").is_file, folder / "superlink.log")
    print((folder / "node-1.log").read_text(encoding="utf-8"))


INSTALLED = find_spec("flwr") is not None
if INSTALLED:
    train()
else:
    print("Flower is not installed here: pip install '.[flower]' in a clone, in an environment of its own")

# %% [markdown]
# ## What the server has
#
# A run's folder, with the shared part and nobody's own; each node's folder has that client's model.

# %%
if INSTALLED:
    record = read_run(folder / "d" / "run")
    for line in record.rounds:
        print({name: line[name] for name in ("round", "loss", "bytes_up_per_client", "bytes_down_per_client")})
    print("loss of each client's own model on its test rows:", record.scores("personal", "loss"))
    assert [line["round"] for line in record.rounds] == [1, 2]
    assert not list((folder / "d" / "run").glob("adapters/clients/*"))
