import inspect

import pytest

import adaptok
from adaptok import errors

FITTING = {
    "ShapeError": ValueError,
    "DtypeError": TypeError,
    "DeviceError": RuntimeError,
    "LabelError": ValueError,
    "BudgetError": ValueError,
    "RoutingError": ValueError,
    "ReductionError": ValueError,
    "ConfigError": ValueError,
    "CheckpointError": ValueError,
    "ProfileError": ValueError,
    "DataError": ValueError,
    "StorageError": OSError,
    "MissingPackageError": ImportError,
    "RegistryError": ValueError,
    "UnknownNameError": KeyError,
    "PluginError": RuntimeError,
    "WrapError": ValueError,
    "HostOptionError": TypeError,
    "HandOverError": RuntimeError,
}
# children of WrapError: the model is as it was before
WRAP = {
    "UnsupportedModelError",
    "AlreadyWrappedError",
    "NotWrappedError",
    "ProbeError",
    "StackError",
}
WARNINGS = {"PluginWarning", "FullBudgetWarning"}


def test_every_error_is_listed_here():
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert defined == FITTING.keys() | WRAP | WARNINGS | {"AdaptokError"}
    assert all(issubclass(getattr(errors, name), UserWarning) for name in WARNINGS)
    assert all(issubclass(getattr(errors, name), errors.WrapError) for name in WRAP)
    assert issubclass(errors.UnsupportedModelError, TypeError)
    assert adaptok.AdaptokError is errors.AdaptokError


@pytest.mark.parametrize("name", FITTING)
def test_an_error_is_an_adaptok_error_and_the_builtin_that_fits(name):
    error = getattr(errors, name)
    assert error.__bases__ == (errors.AdaptokError, FITTING[name])
    assert error.__doc__
    for caught in (errors.AdaptokError, FITTING[name]):
        with pytest.raises(caught, match="what came and what to do"):
            raise error("what came and what to do")


def test_the_root_is_no_builtin_but_an_exception():
    assert errors.AdaptokError.__bases__ == (Exception,)
