"""The choices on which other options depend, read before tyro reads the rest: method, data source, partition.

So a command's parser is made for what was chosen, and knows no option that would not be read.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence

from fedvlm_jax.analysis.plan_options import Request
from fedvlm_jax.config.compare_options import Compare
from fedvlm_jax.config.option_checks import plain
from fedvlm_jax.config.run_options import SHARE, Run, methods_available
from fedvlm_jax.data.config import DataOptions
from fedvlm_jax.data.sources.registry import list_owners, make_options
from fedvlm_jax.errors import UserError
from fedvlm_jax.methods.config import MethodOptions, find_method_options, list_method_flags
from fedvlm_jax.utils.option_ranges import list_options


def make_signature(command: Callable[..., None], words: Sequence[str]) -> inspect.Signature:
    """Return a command's signature, with the options of what the words choose as its defaults.

    Raises:
        UserError: a word is an option of something else than what is chosen.
    """
    signature = inspect.signature(command)
    named = _find_values(words, "--method")
    chosen: dict[str, object] = {}
    for parameter in signature.parameters.values():
        match parameter.default:
            case DataOptions():
                chosen[parameter.name] = _choose_data(words)
            case Compare():
                chosen[parameter.name] = _choose_methods(words)
            case Request():
                name = _choose_method(words, named)
                chosen[parameter.name] = Request(method=name, method_options=find_method_options(name)())
            case Run():
                chosen[parameter.name] = Run(method=_choose_method(words, named), data=_choose_data(words))
            case MethodOptions():  # `explain` takes the method without its flag
                named = named or [word for word in words if word in (*methods_available(), SHARE)]
                name = _choose_method(words, named)
                chosen[parameter.name] = find_method_options(name)()
                if name == SHARE:
                    chosen["method"] = SHARE
            case _:
                pass
    kept = signature.parameters.values()
    return signature.replace(parameters=[p.replace(default=chosen.get(p.name, p.default)) for p in kept])


def _choose_methods(words: Sequence[str]) -> Compare:
    named = _find_values(words, "--benchmark")
    default = _choose_benchmark(words, named[0]) if named else Compare(base=Run(data=_choose_data(words)))
    compared = list(dict.fromkeys(map(plain, _find_values(words, "--methods") or default.methods)))
    if SHARE not in compared and _find_values(words, "--share"):
        raise UserError(f"--share is the rule of {SHARE}, which is not compared: compare {SHARE} too")
    taken = [flag.replace(".", f".{name}.", 1) for name in compared for flag in list_method_flags(name)]
    _refuse_others(words, "--method.", taken, _list_methods, f"--methods {' '.join(compared)} has")
    numbers = {name: find_method_options(name)() for name in compared if list_method_flags(name)}
    return dataclasses.replace(default, method_options=numbers)


def _choose_benchmark(words: Sequence[str], name: str) -> Compare:
    from fedvlm_jax.config.benchmark import find_benchmark

    for flag in ("--data", "--data.partition", "--data.form"):
        if _find_values(words, flag):
            raise UserError(f"{flag} is settled by --benchmark {name}: leave it out, or leave out --benchmark")
    return find_benchmark(name).make_comparison()


def _choose_method(words: Sequence[str], names: Sequence[str]) -> str:
    if _find_values(words, "--share"):
        if names and names[0] != SHARE:
            raise UserError(
                f"--share makes a method of its own, named {SHARE}: leave out --method {names[0]}, or leave out --share"
            )
        names = [SHARE]
    name = names[0] if names else Run().method
    _refuse_others(words, "--method.", list_method_flags(name), _list_methods, f"--method {name} has")
    return name


def _choose_data(words: Sequence[str]) -> DataOptions:
    source = (_find_values(words, "--data") or [DataOptions().source])[0]
    kind = (_find_values(words, "--data.partition") or [DataOptions().partition.kind])[0]
    form = (_find_values(words, "--data.form") or [None])[0]
    options = make_options(source, kind, form)
    taken = [option.flag for option in list_options(options, "data")]
    _refuse_others(
        words, "--data.", taken, list_owners, f"--data {source}{_name_form(options)} with --data.partition {kind} has"
    )
    return options


def _name_form(options: DataOptions) -> str:
    form = getattr(options, "form", "")
    return f" (form {form})" if form else ""


def _list_methods(flag: str) -> list[str]:
    """List the methods that have an option, whichever method it was written for."""
    flag = f"--method.{flag.rpartition('.')[2]}"
    return [name for name in (*methods_available(), SHARE) if flag in list_method_flags(name)]


def _find_values(words: Sequence[str], flag: str) -> list[str]:
    """Return what stands after the last of these flags, up to the next flag.

    >>> _find_values(["--methods", "local", "plora", "--seeds=3"], "--methods")
    ['local', 'plora']
    """
    values: list[str] = []
    inside = False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            inside = name == flag
            values = ([value] if equals else []) if inside else values
        elif inside:
            values.append(word)
    return values


def _refuse_others(
    words: Sequence[str], group: str, taken: Sequence[str], find_owners: Callable[[str], Sequence[str]], chosen: str
) -> None:
    """Refuse options that only what was not chosen has; what nothing has tyro refuses, and says what is like it."""
    for word in words:
        flag = word.partition("=")[0].replace("_", "-").replace(".no-", ".")
        flag = "--data.clients" if flag == "--clients" else flag
        if flag.startswith(group) and flag not in taken and (owners := find_owners(flag)):
            few = ", ".join(taken) or "none" if len(taken) <= 8 else "no such option"
            raise UserError(f"{flag} belongs to {', '.join(owners)}; {chosen} {few}")
