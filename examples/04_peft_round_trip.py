# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # To PEFT and back
#
# Two clients train together, their adapters go out as folders that PEFT loads, PEFT trains one of them further, and
# what it saved comes back. PEFT's own part needs PyTorch; without it the rest still runs.

# %%
import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import Florence2Config

from fedvlm_jax.config.run_options import EvaluationOptions, LoraOptions, Run, TrainOptions
from fedvlm_jax.config.start_folder import fit_start
from fedvlm_jax.data.sources import emoji
from fedvlm_jax.export.logit_check import make_batch
from fedvlm_jax.export.peft_export import export_peft
from fedvlm_jax.models import load_vlm, resolve_folder, save_checkpoint
from fedvlm_jax.models.florence2 import build
from fedvlm_jax.peft import read_peft, write_peft
from fedvlm_jax.training import federated_run

folder, has_peft = Path(tempfile.mkdtemp()), bool(find_spec("torch") and find_spec("peft"))
if not has_peft:
    print("PEFT's part is left out; to run it: pip install '.[parity]'")

# %% [markdown]
# ## A base
#
# A Florence-2 of one narrow layer each and random weights, so that this takes seconds, with the shipped model's
# tokenizer and processor. Any folder or hub id that `--model` takes can stand in its place.

# %%
shipped, base = resolve_folder("florence2-nano"), folder / "base"
shutil.copytree(shipped, base)
config = Florence2Config.from_pretrained(shipped)
config.text_config.update({"d_model": 16, "encoder_layers": 1, "decoder_layers": 1})
one_stage = {"embed_dim": [8], "depths": [1], "num_heads": [1], "num_groups": [1], "patch_prenorm": [False]}
patches = {"patch_size": [16], "patch_stride": [16], "patch_padding": [0]}
config.vision_config.update({"projection_dim": 16, **one_stage, **patches})
vlm = build(config)
save_checkpoint(vlm, jax.jit(vlm.init)(jax.random.key(0)), base)

# %% [markdown]
# ## Out
#
# `export_peft` is what `fedvlm export RUN` calls: a folder for each client, and one for what they share. It reads them
# back and returns by how much a logit differs at most from the run's own model.

# %%
run = Run(
    model=str(base),
    method="plora",
    data=emoji.Options(
        languages=("de",), vendors=("noto", "fluent"), images_per_client=8, validation_per_client=2, test_per_client=2
    ),
    train=TrainOptions(rounds=2, local_steps=2, batch_size=4),
    lora=LoraOptions(rank=2, targets=r"language_model/.*(q|v)_proj"),
    evaluation=EvaluationOptions(max_answer_tokens=4, global_model=False, before_redistribution=False, examples=0),
    out=folder / "run",
)
count, error = export_peft(federated_run.train(run), folder / "peft")
print(f"{count} folders; read back, logits are off by {error}")
print(*sorted(str(place.relative_to(folder)) for place in folder.glob("peft/**/adapter_*")), sep="\n")

# %% [markdown]
# ## The same logits in PEFT
#
# Both models get a picture of noise and random tokens. Two programs round differently with no adapter, too: what the
# bare base is off by says what to expect. Without `dtype`, transformers computes in what the file holds.

# %%
(vlm, params), client, batch = load_vlm(base), folder / "peft/clients/noto-de", make_batch(vlm)
adapter = read_peft(client, vlm).adapter


def differ(one, other):
    """The largest difference of a logit."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


if has_peft:
    import torch
    from peft import PeftModel
    from transformers import Florence2ForConditionalGeneration

    inputs = {name: torch.tensor(array) for name, array in batch.items()}
    inputs["labels"] = inputs["labels"].long()
    inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2)  # channels first
    bare = Florence2ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(bare, client, is_trainable=True).eval()  # eval: without dropout
    with torch.no_grad(), model.disable_adapter():
        base_error = differ(vlm.logits(params, None, batch), model(**inputs).logits)
    with torch.no_grad():
        error = differ(vlm.logits(params, adapter, batch), model(**inputs).logits)
    print(f"with the adapter logits are off by {error:.1e}, those of the bare base by {base_error:.1e}")
    assert error < 3 * base_error

# %% [markdown]
# ## A step further
#
# PEFT trains a step and saves. Without PEFT, B is doubled in the file, which holds plain arrays.

# %%
further, file = folder / "further", "adapter_model.safetensors"
if has_peft:
    optimizer = torch.optim.AdamW([factor for factor in model.parameters() if factor.requires_grad], lr=1e-2)
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(further)
    print(f"loss {loss.item():.4f} -> {model(**inputs).loss.item():.4f}")
else:
    shutil.copytree(client, further)
    arrays = load_file(client / file)
    save_file({name: 2 * array if "lora_B" in name else array for name, array in arrays.items()}, further / file)

# %% [markdown]
# ## Back
#
# `read_peft` makes an adapter of it. Written once more, its arrays are those that PEFT saved, bit for bit.

# %%
back = read_peft(further, vlm).adapter
write_peft(folder / "again", vlm, back, str(base))
saved, again = load_file(further / file), load_file(folder / "again" / file)
assert saved.keys() == again.keys()
assert all(np.array_equal(saved[name], again[name]) for name in saved)
moved = differ(vlm.logits(params, back, batch), vlm.logits(params, adapter, batch))
print(f"{len(saved)} arrays are the same; the step moved logits by {moved:.1e}")
assert moved > 0
if has_peft:
    with torch.no_grad():
        error = differ(vlm.logits(params, back, batch), model(**inputs).logits)
    print(f"they are off by {error:.1e} from PEFT's")
    assert error < 3 * base_error

# %% [markdown]
# `fedvlm train --start FOLDER`, or `start` of a `Run`, begins a federation with it: of its rank, its alpha, its sites.

# %%
begun = fit_start(replace(run, start=further, lora=LoraOptions()))
print(begun.lora.rank, begun.lora.alpha, begun.lora.targets)
