"""Documents and code refer to what exists: every path, module, section and link is followed."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
TEXT = {".py", ".md", ".sh", ".c", ".toml", ".yml", ".yaml", ""}
RECORDED = "benchmarks/results/20"  # what machines measured: it tells of the tree of its day
# A citation is a document of the reference with the numbers of sections behind it, on one line.
SECTION = r"(?:[A-G]\.\d+|[A-G]\d*|\d+(?:\.\d+)*)"
JOINED = r"(?:,? and|,| to| sections?)?"
CITATION = re.compile(rf"docs/reference/(\w+)\.md((?:{JOINED} {SECTION}(?!\w)(?!\.\d))*)")
TOPS = ("engine", "kernels", "virtual_gpu", "benchmarks", "tests", "docs", "workflows", r"\.runpod")
PLACE = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOPS)})/[\w./-]*[\w-]")
MODULE = re.compile(r"`((?:engine|kernels|benchmarks|tests)(?:\.\w+)+)")
MADE = re.compile(r"\.(mp4|npz|lock)$|/(?:out|packages)(?:/|$)")  # what commands make


if not (ROOT / ".git").exists():
    pytest.skip("this is no checkout: git knows which files there are", allow_module_level=True)


def texts():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in TEXT and path.is_file() and not name.startswith(RECORDED):
            yield name, path.read_text(encoding="utf-8")


TEXTS = dict(texts())


def headings(document):
    """The numbers with which the headings of a document begin."""
    found = re.findall(rf"^#+ ({SECTION})(?=[ .])", document.read_text("utf-8"), re.MULTILINE)
    return {number.rstrip(".") for number in found}


def test_every_citation_names_a_section_that_is_there():
    held = {path.stem: headings(path) for path in REFERENCE.glob("*.md")}
    cited, missing = 0, []
    for name, text in TEXTS.items():
        for document, sections in CITATION.findall(text):
            cited += 1
            if document not in held:
                missing.append(f"{name}: docs/reference/{document}.md")
                continue
            wanted = re.findall(rf"{SECTION}(?![\w])", sections)
            missing += [
                f"{name}: {document}.md {one}" for one in wanted if one not in held[document]
            ]
    assert missing == []
    assert cited > 100


def test_every_document_of_the_reference_is_cited():
    cited = {document for text in TEXTS.values() for document, _ in CITATION.findall(text)}
    assert {path.stem for path in REFERENCE.glob("*.md")} - cited <= {"README"}


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("tests/")])
def test_every_path_that_is_named_exists(name):
    wrong = []
    for place in PLACE.findall(TEXTS[name]):
        known = (ROOT / place).exists() or MADE.search(place)
        if not known and not re.search(r"[A-Z]{2}|\*", place):  # OP.py stands for any op
            wrong.append(place)
    assert wrong == []


def test_every_module_that_is_named_exists():
    wrong = []
    for name, text in TEXTS.items():
        for dotted in MODULE.findall(text):
            parts = dotted.split(".")
            if parts[-1] in ("json", "md"):  # the name of a file
                continue
            depth = next(
                (
                    n
                    for n in range(len(parts), 0, -1)
                    if (base := ROOT.joinpath(*parts[:n])).with_suffix(".py").is_file()
                    or base.is_dir()
                ),
                0,
            )
            path = ROOT.joinpath(*parts[:depth])
            file = path.with_suffix(".py") if not path.is_dir() else path / "__init__.py"
            rest = parts[depth : depth + 1]
            if rest and not re.search(rf"\b{rest[0]}\b", file.read_text("utf-8")):
                wrong.append(f"{name}: {dotted}")
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".md")])
def test_every_link_of_a_document_leads_somewhere(name):
    home = (ROOT / name).parent
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXTS[name])
    assert [link for link in links if not (home / link).exists()] == []


def test_nothing_cites_a_document_that_is_not_in_the_repository():
    outside = re.compile(r"\b(?:spec/\w+\.md|DESIGN\.md|HOUSE_STYLE(?:\.md)?|LAYOUT\.md)")
    here = str(Path(__file__).relative_to(ROOT))
    assert [name for name, text in TEXTS.items() if name != here and outside.search(text)] == []


@pytest.mark.parametrize(("name", "most"), [("README.md", 240), ("ARCHITECTURE.md", 170)])
def test_the_documents_that_everybody_reads_stay_short(name, most):
    assert 50 < len(TEXTS[name].splitlines()) <= most


def test_architecture_tells_every_folder_of_the_engine():
    folders = [path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")]
    told = TEXTS["ARCHITECTURE.md"]
    assert [folder for folder in folders if f"{folder}/" not in told] == []


def test_the_flat_files_of_the_engine_are_few():
    assert len([*(ROOT / "engine").glob("*.py")]) <= 17
