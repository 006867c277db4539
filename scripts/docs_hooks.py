"""What the site needs beyond its pages: formulas, files outside of docs/, wide tables.

Used by mkdocs (`hooks` in mkdocs.yml). Formulas become MathML when the site is built, so that no
page loads a script for them. A page may link to a file of the repository, as GitHub shows it; the
site then has a page of that file, and the link leads there. A picture by itself opens in full size.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
FOLDER = "repository"  # pages of files outside of docs/
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL | re.IGNORECASE
)
PICTURE = re.compile(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>')
WIDE = re.compile(r"^\|(?:[ :-]*-[ :-]*\|){6,}$", re.MULTILINE)  # a table of six columns and more
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".yml": "yaml", ".sh": "bash"}
LINES = 400  # of a file that is shown; longer ones are data


def find_outside(source: Path, target: str) -> Path | None:
    """Return the file of the repository outside of docs/ that a link leads to."""
    path = (source.parent / target).resolve()
    if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT) or not path.is_file():
        return None
    return path.relative_to(ROOT)


def name_page(path: Path) -> str:
    """Return where the page of a file lies in the site."""
    stem = path.with_suffix("") if path.suffix == ".md" else path
    return f"{FOLDER}/{stem.as_posix()}.md"


def show_file(path: Path) -> str:
    """Return the page of a file: text as it is, code in a block."""
    text = (ROOT / path).read_text()
    if path.suffix == ".md":
        return LINK.sub(r"\1", re.sub(r"(?<!!)\[([^\]]*)\]\((?!https://)[^)]+\)", r"\1", text))
    shown = "\n".join(text.splitlines()[:LINES])
    language = LANGUAGES.get(path.suffix, "text")
    wide = "---\nhide: [navigation, toc]\n---\n\n"
    return f"{wide}# {path.name}\n\n`{path.as_posix()}`\n\n````{language}\n{shown}\n````\n"


def links_of(files: Files) -> Iterator[Path]:
    """Yield the files outside of docs/ that pages link to."""
    for file in files.documentation_pages():
        if file.abs_src_path is None:
            continue
        source = Path(file.abs_src_path)
        for _, target, _ in LINK.findall(source.read_text()):
            path = find_outside(source, target)
            if path is not None:
                yield path


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each file outside of docs/ that a page links to."""
    for path in sorted(set(links_of(files))):
        page = File.generated(config, name_page(path), content=show_file(path))
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files outside of docs/ lead to their pages, and give wide tables room."""
    if WIDE.search(markdown):
        page.meta.setdefault("hide", []).append("toc")
    if page.file.abs_src_path is None:
        return markdown
    source = Path(page.file.abs_src_path)

    def lead(match: re.Match[str]) -> str:
        path = find_outside(source, match[2])
        if path is None:
            return match[0]
        target = get_relative_url(name_page(path), page.file.src_uri)
        return f"[{match[1]}]({target}{match[3] or ''})"

    return LINK.sub(lead, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, and pictures into links to themselves."""

    def write(match: re.Match[str]) -> str:
        display = "block" if match[1].lower() == "div" else "inline"
        text = match[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        formula = convert(text.strip(), display=display)
        return f'<{match[1]} class="formula">{formula}</{match[1]}>'

    html = PICTURE.sub(r'<p><a class="picture" href="\2">\1</a></p>', html)
    return FORMULA.sub(write, html)
