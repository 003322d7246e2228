"""Numbers on the command line: plain ASCII digits, and no more of them than a number can have.

Python itself reads much more as a number (`1_000`, digits of every script, spaces around them); who writes those rather
slipped, so they are refused and not guessed at.
"""

import re

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fedvlm_jax.utils.option_ranges import LARGEST_SEED, shorten

WHOLE = re.compile(r"[+-]?[0-9]+", re.ASCII)
DECIMAL = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE)
DIGITS = 20  # more than 64 bits have; what has more is out of every range, and Python refuses to read thousands


def read_int(text: str) -> int:
    """Read a whole number.

    Raises:
        ValueError: it is none, or far beyond every option's range.

    >>> read_int("-12")
    -12
    """
    if not WHOLE.fullmatch(text):
        raise ValueError(f"{shorten(text)} is not a whole number in plain digits, like 1000")
    if len(text.lstrip("+-0")) > DIGITS:
        raise ValueError(f"{shorten(text)} is too large: no option takes more than {LARGEST_SEED}")
    return int(text)


def read_float(text: str) -> float:
    """Read a number with or without a decimal point and an exponent.

    Raises:
        ValueError: it is none.
    """
    if not DECIMAL.fullmatch(text):
        raise ValueError(f"{shorten(text)} is not a number in plain digits, like 0.001 or 1e-3")
    return float(text)


def make_registry(reasons: list[str]) -> ConstructorRegistry:
    """Return what tyro reads numbers with; why one is refused is added to `reasons`, for tyro's message may lack it."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def read_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int | float] | None:
        kind = info.type
        if kind not in (int, float):
            return None

        def read(words: list[str]) -> int | float:
            try:
                return read_int(words[0]) if kind is int else read_float(words[0])
            except ValueError as error:
                reasons.append(str(error))
                raise

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=read,
            is_instance=lambda value: type(value) is kind or (kind is float and type(value) is int),
            str_from_instance=lambda value: [str(value)],
        )

    return registry
