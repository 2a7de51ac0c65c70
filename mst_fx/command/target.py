"""package.module:function -> the report about what the function trains."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import mst_fx
from mst_fx.core.torch_private import inductor


class ExplainError(Exception):
    """There is nothing to report: the text names the module or function, and says what is wrong with it."""


def explained(target: str, options: dict[str, Any], *, step: bool) -> mst_fx.Report:
    """Return the report about a function of a module. What it prints goes to the standard error.

    Args:
        target: "package.module:function" or "path/to/file.py:function"; the function takes no arguments.
        options: of the backend.
        step: the function is a training step itself; otherwise it is called first, and may return what to compile.

    Raises:
        ExplainError: the function is not there, or it fails, or an option is wrong.
    """
    try:
        mst_fx.Config.split(options, inductor.option_names())
    except (TypeError, ValueError) as error:
        raise ExplainError(str(error)) from None
    with redirect_stdout(sys.stderr):
        function = _function(target)
        made = None if step else _called(target, function, "fails (it ran uncompiled; --step leaves that out)")
        given = _given(target, made)
        fn, args, kwargs = given if given is not None else (function, (), {})
        compiled = partial(mst_fx.explain, fn, *args, options=options, **kwargs)
        report: mst_fx.Report = _called(target, compiled, "fails while it is compiled and run")
        return report


def _function(target: str) -> Callable[..., Any]:
    module_name, colon, name = target.rpartition(":")
    if not (colon and module_name and name):
        raise ExplainError(f"{target!r} is not package.module:function")
    module = _module(module_name)
    try:
        function = reduce(getattr, name.split("."), module)
    except AttributeError:
        raise ExplainError(f"{module_name} has no function {name!r}") from None
    if not callable(function):
        raise ExplainError(f"{target} is no function, but of type {type(function).__name__}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ExplainError(f"{target} has to take no arguments, but: {error}") from None
    except ValueError:  # a function without a signature: the call shows what it takes
        pass
    return function


def _module(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix == ".py" and not path.is_file():
        raise ExplainError(f"there is no file {name}")
    if path.suffix != ".py":
        _known(name)
    try:
        return _loaded(path) if path.suffix == ".py" else importlib.import_module(name)
    except Exception as error:
        raise _failed(name, "fails when it is imported", error) from error


def _known(name: str) -> None:
    """Raise an ExplainError where there is no module of a name."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, "fails when it is imported", error) from error
        spec = None
    if spec is None:
        raise ExplainError(f"there is no module {name}; modules are searched in this folder and where Python does")


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _called(target: str, function: Callable[[], Any], trouble: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise _failed(target, trouble, error) from error


def _failed(name: str, trouble: str, error: Exception) -> ExplainError:
    """Print the traceback of an error of the user's code, and return it in one line."""
    traceback.print_exception(error)
    lines = [type(error).__name__, *filter(None, map(str.strip, str(error).splitlines()))]
    text = ": ".join(line.rstrip(":") for line in lines[: 3 if str(error).startswith("backend=") else 2])
    return ExplainError(f"{name} {trouble}: {text}")


def _given(target: str, made: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """Return the function, arguments and keyword arguments that a call has returned; None where it was a step."""
    if callable(made):
        raise ExplainError(f"{target} returns a function alone: return (function, arguments), or run the step in it")
    if not (isinstance(made, tuple) and made and callable(made[0])):
        return None
    fn, args, kwargs = (*made, *((), {})[len(made) - 1 :])[:3]
    if len(made) > 3 or not (isinstance(args, (tuple, list)) and isinstance(kwargs, dict)):
        raise ExplainError(f"{target} returns a function with something else than (function, arguments, keywords)")
    return fn, tuple(args), kwargs
