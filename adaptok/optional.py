"""Imports of packages that only some features need, at the moment they are needed."""

import importlib
from types import ModuleType

from adaptok.errors import MissingPackageError


def import_optional(name: str, *, extra: str) -> ModuleType:
    """Import a package that an extra of adaptok installs.

    Args:
        name: dotted module name, `"diffusers"` or `"PIL.Image"`.
        extra: the extra of adaptok that brings the package.

    Returns:
        The imported module.

    Raises:
        MissingPackageError: the package is not installed; the message holds the command.

    Example:
        >>> import_optional("json", extra="train").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackageError(
            f"this needs the package {package!r}, which cannot be imported ({error}): "
            f'run `pip install "adaptok[{extra}]"`'
        ) from error
