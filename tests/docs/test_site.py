"""The built site: links, assets, and what a reader sees in a real browser at two widths."""

from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlparse

import pytest

WIDTHS = {"desktop": 1280, "phone": 390}


class Reader(HTMLParser):
    """Notes the links, the assets and the anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.assets, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if "id" in known:
            self.anchors.add(known["id"])
        if tag == "a" and known.get("href"):
            self.links.append(known["href"])
        if tag in ("img", "script", "source", "iframe") and known.get("src"):
            self.assets.append(known["src"])
        if tag == "link" and known.get("href"):
            self.assets.append(known["href"])


@pytest.fixture(scope="module")
def pages(site):
    """All pages but the one for unknown addresses, by their path from the root of the site."""
    found = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    return {"/" + path.relative_to(site).as_posix(): Reader(path.read_text()) for path in found}


def resolve(page, target):
    """Return the path and the anchor of a link, or None where it leaves the site."""
    parts = urlparse(urljoin(f"http://here{page}", target))
    if parts.scheme not in ("http", "https") or parts.netloc != "here":
        return None
    path = unquote(parts.path)
    return (path + "index.html" if path.endswith("/") else path), unquote(parts.fragment)


def find_dead(site, pages):
    """Return the links and assets that lead nowhere, with the page that they are on."""
    dead = []
    for page, reader in pages.items():
        for target in [*reader.links, *reader.assets]:
            found = resolve(page, target)
            if found is None:
                continue
            path, anchor = found
            lost = path in pages and anchor not in {"", *pages[path].anchors}
            if not (site / path.lstrip("/")).is_file() or (lost and not anchor.startswith("__")):
                dead.append((page, target))
    return dead


def test_no_link_is_dead(site, pages):
    assert not find_dead(site, pages)


@pytest.mark.parametrize("target", ["nowhere/", "api/wrap/#adaptok.nothing", "pictures/none.png"])
def test_a_dead_link_is_noticed(site, pages, target):
    more = {**pages, "/index.html": Reader(f'<a href="{target}">x</a>')}
    assert find_dead(site, more) == [("/index.html", target)]


def test_every_page_is_reached_from_the_first(pages):
    seen, waiting = set(), ["/index.html"]
    while waiting:
        page = waiting.pop()
        if page in seen or page not in pages:
            continue
        seen.add(page)
        waiting += [found[0] for link in pages[page].links if (found := resolve(page, link))]
    assert set(pages) == seen


def test_nothing_is_loaded_from_elsewhere(pages, site):
    foreign = [
        (page, asset)
        for page, reader in pages.items()
        for asset in reader.assets
        if resolve(page, asset) is None and not asset.startswith("data:")
    ]
    assert not foreign
    for path in site.rglob("*.css"):
        text = path.read_text()
        assert "url(http" not in text
        assert "@import" not in text


def test_formulas_are_mathml(pages, site):
    page = (site / "methods" / "graph" / "index.html").read_text()
    assert page.count("<math") == 2
    assert "arithmatex" not in page


BROKEN = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"


def find_problems(browser, page):
    """Return what is wrong with the page that is open: sideways scrolling, errors, pictures."""
    problems = []
    for name, width in WIDTHS.items():
        browser.set_screen(width, 900)
        wide = browser.run("return document.documentElement.scrollWidth")
        if wide > width:
            problems.append(f"{page} is {wide} pixels wide on a {name} of {width}")
    problems += [f"{page}: {message}" for message in browser.errors()]
    if browser.run(BROKEN):
        problems.append(f"{page} shows a broken picture")
    return problems


def open_page(browser, url):
    """Open a page on a screen of the first width."""
    browser.set_screen(WIDTHS["desktop"], 900)
    browser.driver.get(url)


def test_files_outside_of_docs_have_pages(pages):
    page = "/repository/examples/wrap_vit.py/index.html"
    assert page in pages
    assert page in [
        found[0]
        for link in pages["/examples/index.html"].links
        if (found := resolve("/examples/index.html", link))
    ]


def test_pages_in_a_browser(browser, address, pages):
    """No error in the console, and nothing to scroll sideways, at both widths."""
    problems = []
    browser.errors()
    for page in pages:
        open_page(browser, address + page)
        problems += find_problems(browser, page)
    assert not problems


def test_problems_are_noticed(browser, address):
    open_page(browser, address + "/changelog/")
    assert not find_problems(browser, "")
    browser.run(
        "document.querySelector('article').insertAdjacentHTML('beforeend',"
        " '<div style=\"width: 900px\">wide</div><img src=\"none.png\">'); console.error('no')"
    )
    browser.wait_until(BROKEN + " > 0")
    found = find_problems(browser, "it")
    assert "it is 9" in found[0]
    assert "phone" in found[0]
    assert any("404" in problem for problem in found)
    assert any("no" in problem for problem in found)
    assert found[-1] == "it shows a broken picture"


@pytest.mark.parametrize("device", WIDTHS)
def test_search_finds_wrap(browser, address, device):
    browser.set_screen(WIDTHS[device], 900)
    browser.driver.get(address + "/")
    if device == "phone":
        browser.find("label.md-header__button[for='__search']").click()
    box = browser.find("input.md-search__input")
    browser.wait_until("return document.querySelector('.md-search__input').offsetWidth > 0")
    box.click()
    box.send_keys("wrap")
    browser.wait_until("return document.querySelectorAll('.md-search-result__item').length > 0")
    browser.wait_until(
        "return [...document.querySelectorAll('.md-search-result__link')]"
        ".some(link => /(api\\/wrap|wrapping)\\//.test(link.href))"
    )
    first = browser.find(".md-search-result__link").get_attribute("href")
    browser.driver.get(first)
    assert "wrap" in browser.run("return document.querySelector('article').innerText").lower()
    assert not browser.errors()


def test_colours_follow_the_system_and_can_be_switched(browser, address):
    browser.set_screen(WIDTHS["desktop"], 900, dark=True)
    browser.driver.get(address + "/")
    is_scheme = "return document.body.getAttribute('data-md-color-scheme') === "
    browser.wait_until(is_scheme + "'slate'")
    browser.set_screen(WIDTHS["desktop"], 900)
    browser.wait_until(is_scheme + "'default'")
    switch = "form[data-md-component='palette'] label:not([hidden])"
    browser.find(switch).click()  # light, whatever the system says
    browser.find(switch).click()  # dark
    browser.wait_until(is_scheme + "'slate'")
    browser.run("localStorage.clear()")
    assert not browser.errors()
