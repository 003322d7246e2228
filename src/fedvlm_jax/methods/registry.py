"""Load a method by its name: `fedavg-lora` is `zoo/fedavg_lora.py`'s `make`."""

import importlib.util

from fedvlm_jax.errors import UserError, explain_error
from fedvlm_jax.methods.base import AVERAGING, Method, Setup
from fedvlm_jax.methods.config import name_module


def load_method(name: str, setup: Setup) -> Method:
    """Make the method of this name, `plora` say, for a setup.

    Raises:
        UserError: its file is not there, cannot be imported or has no `make`, or says of the method what cannot be:
            another name, unknown options.
    """
    module = name_module(name)
    file = "/".join(module.split(".")[1:]) + ".py"
    if importlib.util.find_spec(module) is None:
        raise UserError(f"--method {name}: there is no {file}; a method's file is named with _ where its name has -")
    try:
        make = getattr(importlib.import_module(module), "make", None)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{file} cannot be imported: {explain_error(error)}") from error
    if make is None:
        raise UserError(f"{file} defines no make(setup), which every file in methods/zoo/ must")
    method = make(setup)
    if method.name != name:
        raise UserError(f"{file} makes a method named {method.name!r}: it must have its file's name, {name!r}")
    acting = ("privacy", "participation.attack", "messages", "top-k", "audit.keep")  # on messages
    known = {*AVERAGING, "train.weighting", "start", "lora.targets", "samples", *acting}
    if unknown := sorted({*method.refuses, *method.moot} - known):
        raise UserError(
            f"{file} names options that there are not: {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    return method
