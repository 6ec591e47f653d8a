"""The docs point at what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(file):
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file):
    text = file.read_text()
    assert not re.search(r"@[A-Z]+@", text)  # what was to be filled in
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        other = (file.parent / name).resolve() if name else file
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_recipe_names_a_section_that_there_is():
    titles = re.findall(r"^## (.*)$", (ROOT / "docs/results.md").read_text(), re.MULTILINE)
    for file in (ROOT / "configs").glob("*.yaml"):
        words = " ".join(re.findall(r"^# *(.*)$", file.read_text(), re.MULTILINE))
        for name in re.findall(r'docs/results\.md, "([^"]+)"', words):
            assert name in titles, f"{file.name}: {name}"
        for name in re.findall(r"docs/[\w-]+\.md", words):
            assert (ROOT / name).is_file(), f"{file.name}: {name}"
