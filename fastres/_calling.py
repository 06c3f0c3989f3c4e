"""Calling a class with keyword arguments that a user wrote: the check before the call, and the words of its errors."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def checked_call(
    label: str,
    factory: Callable[..., Any],
    args: tuple[Any, ...],
    given: dict[str, Any],
    config: dict[str, Any],
) -> Any:
    """``factory(*args, **given, **config)``, after a check that it can take these arguments.

    ``args`` and ``given`` come from the calling code, ``config`` from the user's config. ``label`` opens the message of
    the TypeError that names the keys it cannot take, those that are missing, and those it wants.
    """
    clash = [key for key in config if key in given]
    if clash:
        raise TypeError(f"{label}: {listed(clash)} given twice, by the config and by the calling code")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none; their own call has to tell
        return factory(*args, **given, **config)
    names, takes_any = named_parameters(factory)
    wanted, unknown = list(names), [key for key in config if key not in names]
    try:
        occupied = signature.bind_partial(*args, **given).arguments
        wanted = [name for name in wanted if name not in occupied]
        if not unknown or takes_any:
            signature.bind(*args, **given, **config)
    except TypeError as error:
        raise TypeError(f"{label}: {error}; wanted: {listed(wanted)}") from None
    if unknown and not takes_any:
        raise TypeError(_unknown_keys(label, unknown, wanted))
    try:
        return factory(*args, **given, **config)
    except TypeError as error:
        # A class with **kwargs may hand them on to one that refuses them, which only the call itself can show.
        refused = [key for key in unknown if f"unexpected keyword argument {key!r}" in str(error)]
        if not refused:
            raise
        raise TypeError(_unknown_keys(label, refused, wanted)) from error


def named_parameters(factory: Callable[..., Any]) -> tuple[dict[str, None], bool]:
    """The parameters that can be given by name, in order, and whether the signature admits any other name.

    Where a class has ``**kwargs``, the parameters of the base classes it may hand them to count as well.
    """
    steps: list[Any] = [factory]
    if inspect.isclass(factory):
        steps += [base.__dict__["__init__"] for base in factory.__mro__[:-1] if "__init__" in base.__dict__]
    names: dict[str, None] = {}
    for i, step in enumerate(steps):
        try:
            parameters = list(inspect.signature(step).parameters.values())[i > 0 :]  # without self
        except (TypeError, ValueError):
            break
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names.update(dict.fromkeys(named))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names, i > 0
    return names, True


def takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether ``factory`` can be called with the keyword argument ``name``, as far as signatures tell."""
    names, takes_any = named_parameters(factory)
    return takes_any or name in names


def _unknown_keys(label: str, keys: Sequence[Any], accepted: Sequence[str]) -> str:
    shown = ", ".join(f"{key!r}{suggest(str(key), accepted)}" for key in keys)
    return f"{label}: unknown config key {shown}; wanted: {listed(accepted)}"


def suggest(wrong: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'BN'?)`` or nothing. Case does not count, so that 'fusedbn' finds 'FusedBN'."""
    by_lower: dict[str, list[str]] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    near = difflib.get_close_matches(wrong.lower(), by_lower, n=3)
    names = [name for key in near for name in by_lower[key]]
    return f" (did you mean {listed(names, ' or ')}?)" if names else ""


def listed(names: Sequence[Any], separator: str = ", ") -> str:
    """The names in quotes, or the word none."""
    return separator.join(map(repr, names)) or "none"


def type_name(value: Any) -> str:
    """The name of a value's type, for messages."""
    return type(value).__name__


def path_of(module: Any) -> str:
    """Where a class or function is defined, as ``package.module.Name``."""
    name = getattr(module, "__qualname__", None)
    return repr(module) if name is None else f"{module.__module__}.{name}"
