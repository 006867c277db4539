"""Everything that adaptok raises on purpose.

Each error is an `AdaptokError` and also the built-in error that fits, so that both
`except AdaptokError` and `except ValueError` catch it. A message says what came, what is
needed, and what to do.
"""


class AdaptokError(Exception):
    """The root of all errors that adaptok raises on purpose."""


class ShapeError(AdaptokError, ValueError):
    """A tensor has the wrong number of axes or the wrong length along one of them."""


class DtypeError(AdaptokError, TypeError):
    """A tensor has a dtype that the operation cannot take."""


class DeviceError(AdaptokError, RuntimeError):
    """Tensors that must lie on one device lie on several."""


class LabelError(AdaptokError, ValueError):
    """A class label lies outside the classes of the model."""


class BudgetError(AdaptokError, ValueError):
    """A budget is out of range, contradicts itself, or does not fit the layout."""


class RoutingError(AdaptokError, ValueError):
    """A router answered with what is no probability."""


class ReductionError(AdaptokError, ValueError):
    """A stage decided something about tokens that are not there."""


class ConfigError(AdaptokError, ValueError):
    """A configuration has an unknown key, a value out of range, or a newer version."""


class CheckpointError(AdaptokError, ValueError):
    """A checkpoint is missing, truncated, foreign, or belongs to another model."""


class ProfileError(AdaptokError, ValueError):
    """A profile of settings belongs to another model, grid, sampler or stage, or is no profile."""


class DataError(AdaptokError, ValueError):
    """A data set cannot be read, is empty, or does not have the expected layout."""


class StorageError(AdaptokError, OSError):
    """A file could not be written; what was saved before is still there."""


class MissingPackageError(AdaptokError, ImportError):
    """An optional package is needed and not installed."""


class RegistryError(AdaptokError, ValueError):
    """A name cannot be registered: it is taken, badly spelt, or its target does not fit."""


class UnknownNameError(AdaptokError, KeyError):
    """No router, chunker or other part has that name."""

    def __str__(self) -> str:  # a KeyError would put quotes around the sentence
        return str(self.args[0])


class PluginError(AdaptokError, RuntimeError):
    """A plug-in could not be loaded."""


class PluginWarning(UserWarning):
    """A plug-in was skipped because it is broken; everything else works."""


class WrapError(AdaptokError, ValueError):
    """A model cannot be wrapped or unwrapped as asked; it is as it was before."""


class UnsupportedModelError(WrapError, TypeError):
    """No backbone adapter knows this model."""


class AlreadyWrappedError(WrapError):
    """The model is wrapped already."""


class NotWrappedError(WrapError):
    """The model is not wrapped."""


class ProbeError(WrapError):
    """A fresh wrap did not do what it promises: identity, fewer tokens, one entry."""


class HostOptionError(AdaptokError, TypeError):
    """A host was asked for something that reaches into single blocks of a wrapped model."""


class HandOverError(AdaptokError, RuntimeError):
    """The blocks of a wrapped model were called without the numbers that they need."""


class StackError(WrapError):
    """Stages cannot run together, or not on this host."""


class FullBudgetWarning(UserWarning):
    """A fresh wrap has no budget and keeps every cell, so that nothing gets faster yet."""
