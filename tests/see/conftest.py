"""A browser for the tests of pages."""

import pytest
from chromium import start_browser


@pytest.fixture(scope="package")
def browser(tmp_path_factory):
    """One browser for all tests of a folder."""
    with start_browser(tmp_path_factory.mktemp("browser")) as started:
        yield started
