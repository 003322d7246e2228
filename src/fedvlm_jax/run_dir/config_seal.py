"""The seal of `config.json`: a digest of all that it holds, by which an edit is noticed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvlm_jax.errors import UserError
from fedvlm_jax.run_dir.validated_files import SEALED, check_form
from fedvlm_jax.utils.digests import digest_parts

SEAL = "digest"
"""The entry of `config.json` that holds the digest of all others."""


def seal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the content of `config.json` a digest of all the rest, by which an edit is noticed.

    >>> sealed = seal({"run": {"seed": 1}})
    >>> sealed == seal(sealed) != seal({"run": {"seed": 2}})
    True
    """
    rest = {name: value for name, value in config.items() if name != SEAL}
    return {**rest, SEAL: digest_parts([json.dumps(rest, sort_keys=True).encode()]).hex()}


def check_seal(path: Path, stored: Mapping[str, Any]) -> None:
    """See that `config.json` is as it was written, and has what is compared with data and model now.

    Raises:
        UserError: it is not, or is of version 0.1.
    """
    if SEAL not in stored:
        raise UserError(f"{path} has no digest: it is of version 0.1, whose runs neither go on nor are evaluated")
    if stored[SEAL] != seal(stored)[SEAL]:
        raise UserError(
            f"{path} is not as the run wrote it: was it edited, or damaged? What a run was made of cannot change; put "
            "the file back, or start a new run with these options"
        )
    check_form(path, stored, SEALED)
