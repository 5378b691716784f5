"""The exceptions of adapterkit. Catch `AdapterKitError` to catch them all; each is also the builtin it resembles.

AdapterKitError
├── ConfigError (ValueError)            a setting is wrong, or two settings contradict each other
├── TargetError (LookupError)           a target names no module, or one that cannot be adapted
├── AdapterNameError (KeyError)         no adapter has this name, the name is taken, or it cannot be used
├── ActivationError (RuntimeError)      the active adapter changed where it must not
├── CompatibilityError (ValueError)     the model, or the tensor a site receives, does not fit the adapter
├── StoreError (ValueError)             a saved adapter is missing, damaged, hostile or too new
└── MissingExtraError (ImportError)     something needs an optional package that is not installed
"""

__all__ = [
    "ActivationError",
    "AdapterKitError",
    "AdapterNameError",
    "CompatibilityError",
    "ConfigError",
    "MissingExtraError",
    "StoreError",
    "TargetError",
]


class AdapterKitError(Exception):
    """Root of every error that adapterkit raises on purpose."""

    # KeyError shows the repr of its message; every class here shows the message itself.
    __str__ = Exception.__str__


class ConfigError(AdapterKitError, ValueError):
    """A setting is wrong, or two settings contradict each other."""


class TargetError(AdapterKitError, LookupError):
    """A target names no module, or one that cannot be adapted."""


class AdapterNameError(AdapterKitError, KeyError):
    """No adapter has this name, the name is taken, or it cannot be used as a name."""


class ActivationError(AdapterKitError, RuntimeError):
    """The active adapter changed between forward and backward, or under another thread."""


class CompatibilityError(AdapterKitError, ValueError):
    """The model, or the tensor that a site receives, does not fit the adapter."""


class StoreError(AdapterKitError, ValueError):
    """A saved adapter is missing, damaged, hostile or written by a newer format."""


class MissingExtraError(AdapterKitError, ImportError):
    """Something needs an optional package that is not installed; the message says how to install it."""
