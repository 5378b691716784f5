"""Configs are pydantic models without a written `__init__`: give each its fields as keyword-only parameters.

So the reference shows a config's signature, and beside each setting its type and default. What a docstring says with "every
other setting: see `AdapterConfig`" stands there in full. The source is read, not imported: the site is built without torch.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

from griffe import (
    Alias,
    AliasResolutionError,
    Attribute,
    Class,
    Extension,
    Function,
    GriffeLoader,
    Module,
    Parameter,
    ParameterKind,
    Parameters,
)

BASES = {"Settings", "_Strict"}  # of configs and heads, and of what is in a manifest
LONGEST = 60  # of an alias that is written out
TOLD_BY_THE_CLASS = {"kind", "method"}  # in JSON they say which class it is
# In a docstring: the block of arguments, one argument in it, the sentence that leads to those of the base class.
ARGS = re.compile(r"^Args:\n(?P<block>(?:    .*\n?)+)", re.MULTILINE)
ARG = re.compile(r"^    (?P<name>\*{0,2}\w+)(?: \(.*?\))?: .*\n?(?:        .*\n?)*", re.MULTILINE)
ELSEWHERE = re.compile(r"^Every other setting: see `\w+`\.\n*", re.MULTILINE)


class SettingsExtension(Extension):
    """Give the classes of configs the `__init__` that pydantic makes of their fields."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Go through the whole package once all of it is loaded."""
        configs = list(_configs_in(pkg))
        made = [(config, _init_of(config), _described(config)) for config in configs]  # before the first is changed
        for config, init, text in made:
            for name in [name for name in config.members if not name.startswith("_")]:
                config.del_member(name)  # fields are parameters now; the rest is for the package itself
            config.set_member("__init__", init)
            if config.docstring is not None:
                config.docstring.value = text


def _configs_in(module: Module) -> Iterator[Class]:
    for member in module.members.values():
        if member.is_alias:
            continue
        if isinstance(member, Module):
            yield from _configs_in(member)
        elif isinstance(member, Class) and any(base.name in BASES for base in member.mro()):
            yield member


def _described(config: Class) -> str:
    """A config's docstring, with what those of its bases say of the settings that it inherits."""
    text = config.docstring.value if config.docstring else ""
    if not ELSEWHERE.search(text):
        return text
    own, inherited = _arguments(config), [base for base in config.mro() if base.docstring]
    missing = {name: line for base in inherited for name, line in _arguments(base).items() if name not in own}
    text = ELSEWHERE.sub("", text)
    if not missing:
        return text
    if not own:
        return f"{text}\n\nArgs:\n{''.join(missing.values())}"
    return ARGS.sub(lambda match: f"Args:\n{match['block'].rstrip()}\n{''.join(missing.values())}\n", text, count=1)


def _arguments(config: Class) -> dict[str, str]:
    """What a docstring says of each argument, by its name."""
    block = ARGS.search(config.docstring.value) if config.docstring else None
    return {match["name"]: f"{match[0].rstrip()}\n" for match in ARG.finditer(block["block"])} if block else {}


def _init_of(config: Class) -> Function:
    """Its own written `__init__`, with the fields in place of `**settings`; or one of all fields."""
    fields: dict[str, Attribute] = {}
    for part in (*reversed(config.mro()), config):
        fields |= {name: member for name, member in part.attributes.items() if _is_field(member)}
    written = next((part.members["__init__"] for part in (config, *config.mro()) if "__init__" in part.members), None)
    own = [Parameter("self", kind=ParameterKind.positional_or_keyword)]
    if isinstance(written, Function):
        own = [parameter for parameter in written.parameters if parameter.kind is not ParameterKind.var_keyword]
    names = {parameter.name for parameter in own}
    rest = [_parameter(name, field) for name, field in fields.items() if name not in names]
    return Function("__init__", parameters=Parameters(*own, *rest), returns="None", parent=config)


def _parameter(name: str, field: Attribute) -> Parameter:
    annotation = _type(ast.parse(str(field.annotation), mode="eval").body, field.module)
    return Parameter(name, annotation=annotation, kind=ParameterKind.keyword_only, default=_default(field))


def _is_field(member: Any) -> bool:
    if not isinstance(member, Attribute) or member.annotation is None or member.name.startswith("_"):
        return False
    return "instance-attribute" in member.labels and member.name not in TOLD_BY_THE_CLASS


def _default(field: Attribute) -> str | None:
    """What a field is if it is not given, as it is written; None if it must be given."""
    if field.value is None:
        return None
    call = ast.parse(str(field.value), mode="eval").body
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "Field"):
        return str(field.value)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return ast.unparse(given["default"]) if "default" in given else None


def _type(node: ast.expr, module: Module) -> str:
    """An annotation as a reader wants it: without pydantic's `Annotated`, aliases such as `Size` written out."""
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        name = ast.unparse(node.value)
        if name in {"Annotated", "SerializeAsAny"}:
            return _type(parts[0], module)
        if name == "Literal":
            return " | ".join(ast.unparse(part) for part in parts)
        return f"{name}[{', '.join(_type(part, module) for part in parts)}]"
    if isinstance(node, ast.BinOp):
        sides = f"{_type(node.left, module)} | {_type(node.right, module)}"
        return sides if "[" in sides else " | ".join(dict.fromkeys(sides.split(" | ")))
    if isinstance(node, ast.Name) and node.id in module.members:
        try:
            found = module.members[node.id]
            found = found.final_target if isinstance(found, Alias) else found
        except AliasResolutionError:  # of another package
            return node.id
        if isinstance(found, Attribute) and found.value is not None:
            written = _type(ast.parse(str(found.value), mode="eval").body, found.module)
            return written if len(written) <= LONGEST else node.id
    return ast.unparse(node)
