"""Reads the sources for the API pages: signatures of configurations, and examples as code.

An extension of griffe, which reads for mkdocstrings without importing anything. The fields of a
pydantic model become the parameters of its constructor, as those of a dataclass do. A section
`Example:` of a docstring is shown as code, which griffe does for `Examples:` only.
"""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^([ ]*)Example:[ ]*$", re.MULTILINE)
MODELS = {"Config", "TransformerConfig", "BaseModel"}


def is_model(class_: griffe.Class) -> bool:
    """Say whether a class is a configuration, by the names of what it is made from."""
    return any(str(base).rsplit(".", 1)[-1] in MODELS for base in class_.bases)


def read_default(value: griffe.Expr | str | None) -> griffe.Expr | str | None:
    """Return a field's default, also where it stands inside `Field(...)`."""
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "Field":
        return value
    for argument in value.arguments:
        if not isinstance(argument, griffe.ExprKeyword):
            return argument
        if argument.name == "default":
            return argument.value
        if argument.name == "default_factory":
            return "..."
    return None


def read_fields(class_: griffe.Class) -> list[griffe.Parameter]:
    """Return the fields of a model, those that it inherits first."""
    try:
        parents = [parent for parent in class_.mro() if is_model(parent)]
    except ValueError:
        parents = []
    fields = {}
    for model in [*reversed(parents), class_]:
        for name, member in model.members.items():
            if member.is_alias or not member.is_attribute or name.startswith("_"):
                continue
            assert isinstance(member, griffe.Attribute)
            if member.annotation is None or name == "model_config":
                continue
            if "class-attribute" in member.labels and "instance-attribute" not in member.labels:
                continue  # ClassVar
            kind = griffe.ParameterKind.keyword_only
            fields[name] = griffe.Parameter(
                name,
                annotation=member.annotation,
                kind=kind,
                default=read_default(member.value),
            )
    return list(fields.values())


class Signatures(griffe.Extension):
    """Adds constructors to configurations, and makes examples code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:  # noqa: ANN401
        """Visit everything in a package that was read."""
        self.visit(pkg)

    def visit(self, parent: griffe.Object) -> None:
        """Visit an object and those below it."""
        if parent.docstring is not None:
            parent.docstring.value = EXAMPLE.sub(r"\1Examples:", parent.docstring.value)
        if isinstance(parent, griffe.Class) and is_model(parent):
            self.sign(parent)
        for member in list(parent.members.values()):
            if isinstance(member, griffe.Object):
                self.visit(member)

    def sign(self, class_: griffe.Class) -> None:
        """Add the constructor of a configuration, and leave out what only checks its fields."""
        for name, member in list(class_.members.items()):
            if isinstance(member, griffe.Function) and any(
                re.search("validator|serializer", str(decorator.value))
                for decorator in member.decorators
            ):
                class_.del_member(name)
        if "__init__" in class_.members:
            return
        own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        init = griffe.Function(
            "__init__", parameters=griffe.Parameters(own, *read_fields(class_)), returns="None"
        )
        class_.set_member("__init__", init)
