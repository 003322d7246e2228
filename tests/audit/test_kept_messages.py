"""Files of kept messages that another made, with digests that fit: they are refused in a line."""

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir import kept_messages
from fedvlm_jax.utils import digests
from fedvlm_jax.utils.files import write_json

MESSAGE, SERVER = {"b": np.ones(3, np.float32)}, {"shared": np.zeros(3, np.float32)}


def change(name, make):
    def forge(content):
        arrays = load(content)
        return save({**arrays, name: make(arrays[name])})

    return forge


def drop(name):
    return lambda content: save({key: value for key, value in load(content).items() if key != name})


@pytest.mark.parametrize(
    ("forge", "expected"),
    [
        (lambda content: b"", "holds no round's messages"),
        (lambda content: b"x" * 99, "holds no round's messages"),
        (lambda content: (2**62).to_bytes(8, "little") + content[8:], "holds no round's messages"),
        (drop("numbers"), "holds no round's messages"),
        (drop("weights"), "holds no round's messages"),
        (drop("messages/b"), "does not hold the messages of this run's method"),
        (change("numbers", lambda x: x.astype(np.float32)), "does not say whose messages"),
        (change("numbers", lambda x: x[None]), "does not say whose messages"),
        (change("numbers", lambda x: x[::-1].copy()), "does not say whose messages"),
        (change("weights", lambda x: x[:1]), "does not say whose messages"),
        (change("messages/b", lambda x: x * np.nan), "numbers that are not finite"),
        (change("server/shared", lambda x: x - np.inf), "numbers that are not finite"),
    ],
)
def test_forged_files_are_refused_in_a_line(forge, expected, tmp_path):
    numbers, weights = np.asarray([2, 5]), np.asarray([0.5, 0.5])
    messages = {"b": np.stack([MESSAGE["b"]] * 2)}
    kept_messages.write_round(tmp_path, kept_messages.KeptRound(1, numbers, weights, messages, SERVER))
    assert kept_messages.read_round(tmp_path, 1, MESSAGE, SERVER).numbers.tolist() == [2, 5]
    file = tmp_path / kept_messages.FOLDER / kept_messages.name_file(1)
    file.write_bytes(content := forge(file.read_bytes()))
    write_json(file.with_name(kept_messages.LIST), {"rounds": {"1": digests.digest_parts([content]).hex()}})
    with pytest.raises(UserError, match=expected) as told:
        kept_messages.read_round(tmp_path, 1, MESSAGE, SERVER)
    assert "\n" not in str(told.value)
