import sys

import pytest

from adaptok.errors import MissingPackageError
from adaptok.optional import import_optional


def test_an_installed_module_is_returned():
    import xml.dom

    assert import_optional("xml.dom", extra="train") is xml.dom


def test_a_missing_package_is_named_with_the_command_that_brings_it():
    with pytest.raises(MissingPackageError) as caught:
        import_optional("no_such_package.part", extra="see")
    message = str(caught.value)
    assert "needs the package 'no_such_package'," in message
    assert 'pip install "adaptok[see]"' in message
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_package_that_is_blocked_or_broken_is_named_too(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackageError, match=r"'diffusers'.*adaptok\[diffusion\]"):
        import_optional("diffusers", extra="diffusion")
    (tmp_path / "broken_package.py").write_text("raise ImportError('libfoo.so is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"'broken_package'.*libfoo.so is not there"):
        import_optional("broken_package", extra="train")
