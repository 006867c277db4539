"""Every promise of a wrap on every host of the catalogue; a new host or promise adds its name."""

import json

import pytest

from adaptok.errors import AdaptokError
from benchmarks.architectures import CASES
from benchmarks.host_checks import CHECKS, quietly, wrap_case
from benchmarks.hosts import RESULTS
from benchmarks.hosts_page import PAGE, write_page

# one grid per call is needed, or the list is not iterated: refused by name, counted as such
REFUSED = {
    "timm/naflexvit_base_patch16_gap, sizes mixed": "one grid per call",
    "transformers/siglip2": "one grid per call",
    "plain/own_vit": "let its forward iterate the list",
}
HOSTS = {case.name: case for case in CASES if case.family != "diffusers-extra"}
SLOW = {"fullgraph"}  # `benchmarks/hosts.py` and the tests of each adapter compile


@pytest.fixture(scope="module", params=[name for name in HOSTS if name not in REFUSED])
def wrapped(request):
    return wrap_case(HOSTS[request.param])


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in SLOW])
def test_a_promise_holds_on_a_host(wrapped, check):
    assert quietly(lambda: CHECKS[check](wrapped))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_its_reason(name):
    with pytest.raises(AdaptokError, match=REFUSED[name]):
        CHECKS["identity"](wrap_case(HOSTS[name]))


def test_enough_hosts_run():
    assert len(HOSTS) >= 40
    assert len(HOSTS) - len(REFUSED) >= 36


def test_the_page_of_hosts_is_made_from_the_results_and_names_every_host():
    content = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == write_page(content)
    assert {row["name"] for row in content["rows"]} == set(HOSTS)
    assert {row["name"] for row in content["rows"] if row["state"] == "refused"} == set(REFUSED)
    assert content["counts"]["broken"] == 0
    assert set(content["checks"]) == set(CHECKS)
