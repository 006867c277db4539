"""torch-geometric, imported at the moment it is needed."""

import sys
import warnings
from types import ModuleType

from adaptok.optional import import_optional

PACKAGE = "torch_geometric"


def import_geometric(module: str = "") -> ModuleType:
    """Import a module of torch-geometric.

    Args:
        module: name inside of it, such as `"nn"` or `"utils"`; empty means the package itself.

    Returns:
        The imported module.

    Raises:
        MissingPackageError: the package is not installed; the message holds the command.

    Example:
        >>> import_geometric("utils").__name__
        'torch_geometric.utils'
    """
    name = f"{PACKAGE}.{module}" if module else PACKAGE
    if sys.modules.get(PACKAGE) is not None and name in sys.modules:
        return sys.modules[name]  # the way of compiled graphs, which cannot import
    with warnings.catch_warnings():
        # its import scripts classes of its own, which newer versions of torch warn of
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        import_optional(PACKAGE, extra="graph")
        return import_optional(name, extra="graph")
