# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A first federation from Python
#
# What `fedvlm train` does, in a few lines: four clients (two drawing styles × two languages) fine-tune Florence2-nano,
# which ships with the package, on a handful of emoji each. `Run` holds every option of the command line under the same
# names.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import load_file

from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, Run, TrainOptions
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.run_dir.reader import read_run
from fedvlm_jax.training import federated_run

folder = Path(tempfile.mkdtemp())
run = Run(
    method="plora",
    data=emoji.Options(
        languages=("en", "de"),
        vendors=("noto", "fluent"),
        images_per_client=8,
        validation_per_client=4,
        test_per_client=8,
    ),
    train=TrainOptions(rounds=2, local_steps=2, batch_size=4),
    lora=LoraOptions(rank=2, targets=r"language_model/.*(q|v)_proj"),
    evaluation=EvaluationOptions(every=2, examples=0),
    out=folder / "plora",
)

# %% [markdown]
# `train` runs it and returns its folder. Everything about the run is in there: options, a line per round, checkpoints,
# adapters and results.

# %%
finished = read_run(federated_run.train(run))
for line in finished.rounds:
    print(f"round {line['round']}: {line['bytes_up_per_client']:,} bytes up per client;", sorted(line)[:6])

# %% [markdown]
# ## Results per client
#
# Scores are there for the bare base (`zero_shot`), each client's own model (`personal`) and the shared part alone
# (`global`). So few steps teach little.

# %%
for model in ("zero_shot", "personal", "global"):
    scores = finished.scores(model, "loss")
    print(f"{model:10s}", {client: round(loss, 3) for client, loss in scores.items()})

# %% [markdown]
# ## The adapters
#
# Each client's adapter is a safetensors file; with `merge` it becomes part of the weights.

# %%
for file in sorted((finished.folder / "adapters" / "clients").glob("*.safetensors"))[:1]:
    for name, array in sorted(load_file(file).items())[:3]:
        print(file.name, name, array.shape)

# %% [markdown]
# ## Another method, the same clients
#
# The same seed gives the same clients, batches and first adapter, so methods can be compared client by client. `fedvlm
# compare` does this for several methods and seeds, with intervals.

# %%
alone = read_run(federated_run.train(replace(run, method="local", out=folder / "local")))
shared, local = finished.scores("personal", "loss"), alone.scores("personal", "loss")
for client in shared:
    print(f"{client:12s} plora - local: {shared[client] - local[client]:+.4f} in loss")
