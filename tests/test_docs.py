"""What the documents quote must be true."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import photograph

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_quoted_lines_stand_in_the_source():
    text = (ROOT / "docs/theory.md").read_text()
    quotes = re.findall(r"<!-- code: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(quotes) >= 3
    for file, code in quotes:
        assert code in (ROOT / file).read_text(), f"{file} no longer has\n{code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#|mailto)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(
        r"`((?:latent_ae|pipelines|configs|docs|tests|benchmarks)/[\w./-]+\.\w+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_readme_example_runs(exported, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, tmp_path / "runs/quickstart/autoencoder")
    (tmp_path / "photos").mkdir()
    photograph("coffee").save(tmp_path / "photos/coffee.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 16
    exec(compile(code, "README.md", "exec"), {})


def test_nothing_is_left_to_fill_in():
    for page in sorted((ROOT / "docs").glob("*.md")):
        comments = re.findall(r"<!--\s*(\w+)", page.read_text(encoding="utf-8"))
        assert set(comments) <= {"code"}, f"{page.name} has a placeholder"
