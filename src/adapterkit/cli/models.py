"""Build the model that a command line names."""

import sys
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import AdapterKitError, CompatibilityError, ConfigError, MissingExtraError
from ..structure.anatomy.discover import discover

__all__ = ["MODEL", "load_model"]

MODEL = (
    "a Hugging Face id or folder, timm:NAME, or PACKAGE.MODULE:NAME of an nn.Module or of what returns one when called "
    "(looked for in the current directory, too)"
)
_LARGE = 500_000_000  # parameters: 2 GB in float32, and seconds to initialise


def load_model(name: str) -> nn.Module:
    """Return the model of this name, with random weights or, where it can be traced without, with none (on `meta`).

    Raises:
        ConfigError: there is none, or it cannot be built; the reason is in the message.
        MissingExtraError: the package that builds it is not installed.
    """
    if name.startswith("timm:"):
        return _build(name, _timm(name.removeprefix("timm:")))
    # A folder may have a colon in its path, such as C:\models.
    if ":" in name and not Path(name).is_dir():
        return _import(name)
    return _build(name, _transformers(name))


def _build(name: str, build: Callable[[], Any]) -> nn.Module:
    """Return what `build` makes: on `meta` if it can be traced there or is too large to do otherwise, else on the CPU."""
    try:
        with torch.device("meta"):
            model = build()
        # A model that cannot be traced on `meta` (it looks at values) still shows its roles with real weights, if they fit.
        if _is_traceable(model) or sum(p.numel() for p in model.parameters()) > _LARGE:
            return _check_is_module(name, model)
    except Exception:  # someone else's code; what is wrong with it, if it is not `meta`, shows below
        model = None
    del model
    return _run(name, build)


def _is_traceable(model: nn.Module) -> bool:
    """Tell whether roles can be found in a model without its weights."""
    try:
        discover(model)
    except CompatibilityError:
        return False
    return True


def _transformers(name: str) -> Callable[[], Any]:
    """Build a Hugging Face model from its config: of the class that its checkpoint is of, else of its type's base class."""
    transformers = _package("transformers", name)
    try:
        # To look at a model must not run code that comes with it.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a hub, a file or a config class raises
        raise ConfigError(
            f"{name!r} is not a model that transformers can find: {_one_line(error)}\nMODEL is {MODEL}"
        ) from error
    # e.g. ["BertForMaskedLM"]; None in a config that no checkpoint belongs to
    architecture = next(iter(config.architectures or ()), "")
    kind = getattr(transformers, architecture, None)
    # `from_config` is of the Auto classes; a model's own class has `_from_config`.
    return lambda: transformers.AutoModel.from_config(config) if kind is None else kind._from_config(config)


def _timm(name: str) -> Callable[[], Any]:
    """Return what builds a model of timm, without downloading weights."""
    timm = _package("timm", f"timm:{name}")
    return lambda: timm.create_model(name, pretrained=False)


def _import(name: str) -> nn.Module:
    """Return the nn.Module at `package.module:name`, or what it returns when it is called."""
    where, _, attribute = name.partition(":")
    # A console script has its own folder on the path, not the one that it is called from.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = attrgetter(attribute)(import_module(where))
    except Exception as error:  # whatever the module raises when it is imported
        raise ConfigError(f"{name!r} cannot be imported: {_one_line(error)}") from error
    return _check_is_module(name, found) if isinstance(found, nn.Module) or not callable(found) else _run(name, found)


def _run(name: str, build: Callable[[], Any]) -> nn.Module:
    """Return what `build` makes, after checking that it is a module."""
    try:
        model = build()
    except AdapterKitError:  # the message is for users already
        raise
    except Exception as error:  # someone else's code
        raise ConfigError(f"{name!r} cannot be built: {_one_line(error)}") from error
    return _check_is_module(name, model)


def _check_is_module(name: str, model: object) -> nn.Module:
    """Return the model. Raises ConfigError: it is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} must be an nn.Module, or return one when called; found {type(model).__name__}")
    return model


def _package(package: str, name: str) -> ModuleType:
    """Import the package that builds a model. Raises MissingExtraError, with the model's name."""
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{name!r} needs the package {package!r}, which cannot be imported ({_one_line(error)}): pip install {package}"
        ) from error


def _one_line(error: Exception) -> str:
    """Return an error as one line: its type and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
