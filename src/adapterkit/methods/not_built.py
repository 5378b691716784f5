"""Methods of other libraries and papers that are not built here yet, so that an error can say so."""

__all__ = ["why_not_built"]

# As peft, adapters and the papers spell them, in lower case.
_NAMES = """
    prefix prefix_tuning prefix_tuning_flat prompt prompt_tuning multitask_prompt_tuning ptuning p_tuning cpt
    adaption_prompt reft loreft noreft direft adalora loha lokr oft boft hra shira randlora gralora miss bone c3a
    fourierft waveft delora vblora pvera xlora mtl_lora dvora poly trainable_tokens road tinylora
"""
_NOT_BUILT = frozenset(_NAMES.split())
# Unions in their papers: a part of each is here, the prefixes are not.
_WITH_PREFIXES = frozenset({"mam", "unipelt"})
# Other libraries' names of what is here under another one.
_HERE = {"ln_tuning": "norm_tuning", "pfeiffer+inv": "madx", "adapterplus": "adapter_plus"}


def why_not_built(name: object) -> str | None:
    """Say that a method of this name is known and not built, or what it is called here; None if the name is unknown."""
    # peft and adapters spell "prefix-tuning", "PREFIX_TUNING" and "prefix_tuning".
    known = str(name).lower().replace("-", "_")
    if known in _HERE:
        return f"{name!r} is called {_HERE[known]!r} here"
    if known in _WITH_PREFIXES:
        return f"{name!r} has prefix tuning in it, which is not built yet; ak.Union makes one adapter of those that are"
    return f"{name!r} is not built yet" if known in _NOT_BUILT else None
