"""The languages of the help pages and of the texts on nodes, known by their files."""
from pathlib import Path

from devtools import ROOT

DOCS = ROOT / "nodes" / "web" / "docs"
LOCALES = sorted(path.parent.name for path in (ROOT / "locales").glob("*/nodeDefs.json"))
# What the frontend asks for first is the page of its own language; English it takes for all others.
HELP_LANGUAGES = ["en", *sorted({path.stem for path in DOCS.glob("*/*.md")})]


def help_page(name: str, language: str) -> Path:
    """Returns the file of a help page, which is there or not."""
    return DOCS / (f"{name}.md" if language == "en" else f"{name}/{language}.md")
