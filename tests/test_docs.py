"""What the documents say is there, is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for folder in (".", "docs", "benchmarks", "examples") for page in sorted(ROOT.glob(f"{folder}/*.md"))]


def relative_links(text: str) -> list[str]:
    """Targets of [text](target) outside code fences, those with a scheme and pure anchors left out."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:|#", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as repository viewers derive them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in relative_links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def code_block_after(heading: str, text: str) -> str:
    match = re.search(rf"^#+ {heading}\n.*?^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert match, f"README.md has no section {heading!r} with a code block"
    return match[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A `title`, here\n")
    page.write_text(
        "[a](other.md#a-title-here) [b](gone.md) [c](https://x/y) [d](other.md#gone)\n```\n[e](gone)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "other.md#gone"]


def test_every_path_of_the_map_exists():
    lines = code_block_after("Map", (ROOT / "README.md").read_text()).splitlines()
    paths = [line.split()[0] for line in lines if line.strip()]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_docs_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if page.name != "README.md" and page.name not in index] == []


def test_the_readme_example_runs(tmp_path):
    example = tmp_path / "example.py"
    example.write_text(code_block_after("Example", (ROOT / "README.md").read_text()))
    done = subprocess.run([sys.executable, example], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_changelog_starts_with_the_current_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert version is not None
    assert newest is not None
    assert newest[1] == version[1]
