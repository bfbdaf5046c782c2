"""What scanners of ComfyUI's Registry find in the package: nothing that
tests/registry_review.md does not explain."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from oracles import installed

from devtools import ROOT
from devtools.host.package import packed_files

if not (ROOT / ".git").exists() or not shutil.which("git"):
    pytest.skip("needs git and its checkout", allow_module_level=True)
PAGE = (ROOT / "tests" / "registry_review.md").read_text(encoding="utf-8")
COMPILE = re.compile(
    r"\b(re|torch|_compiler)\.compile\(|def compile\(self, source: str, architecture: str\)")
# What the Registry's rules are known to look for: words, whatever they do there, in comments and
# texts too.
RULES = {
    "subprocess": r"\bsubprocess\b|os\.(system|popen|startfile|exec[lv]|spawn|posix_spawn|fork)"
    r"|\bpty\b|shell\s*=\s*True|find_library",
    "environment, written": r"environb?\[[^]]*\]\s*=[^=]|del os\.environ"
    r"|environb?\.(update|setdefault|pop|clear)|putenv|unsetenv",
    "environment, read": r"os\.environ|getenv",
    "network": r"import socket|\bsocket\.|urllib|urlopen|http\.(client|server)"
    r"|\brequests\.(get|post|request)|aiohttp|httpx|ftplib|smtplib|telnetlib|paramiko"
    r"|import websocket",
    "dynamic import": r"import_module|__import__|exec_module|\bimp\.load|SourceFileLoader|runpy",
    "evaluation": r"\b(eval|exec|execfile)\(|new Function|\bmarshal\b|CodeType",
    "pickles": r"pickle\.loads?\b|Unpickler|\bdill\b|joblib|shelve|allow_pickle=True",
    "databases": r"sqlite3|psycopg|pymysql|pymongo|mysql", "removal": r"rm -rf|\bformat [cC]:",
    "encoded": r"b64decode|b32decode|a85decode|unhexlify|bytes\.fromhex|codecs\.decode"
    r"|zlib\.decompress|lzma|gzip",
    "installation": r"pip install|pip\.main|ensurepip"
}
# what an error advises; `test_advice_...` holds that it is nothing else
TEXT_IN_A_MESSAGE = {"installation"}
ENDINGS = {
    ".py", ".js", ".md", ".json", ".jsonl", ".toml", ".txt", ".jpg", ".png", ".h", ".cpp", ".cu",
    ".metal", ""
}


def rows(heading: str) -> list[list[str]]:
    """Cells of the last table under a heading of the page, without its head."""
    table = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip().rpartition("|---|\n")[2]
    return [[cell.strip().strip("`") for cell in row.split("|")[1:-1]]
            for row in re.findall(r"^\| .*\|$", table, re.M)]


def sources() -> dict[str, str]:
    return {
        path: (ROOT / path).read_text(encoding="utf-8") for path in packed_files()
        if path.endswith((".py", ".js"))
    }


@pytest.fixture(scope="module")
def severe(tmp_path_factory):
    """What nodesafe finds in the package with severity HIGH or above."""
    scanner, folder = pytest.importorskip("nodesafe.scanner"), tmp_path_factory.mktemp("package")
    for path in packed_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return [
        finding for finding in scanner.Scanner().scan(folder).findings
        if finding.severity.value in ("high", "critical")
    ]


def is_the_word_compile(finding) -> bool:
    line = (ROOT / finding.file).read_text(encoding="utf-8").splitlines()[finding.line - 1]
    return "`compile(`" in finding.title and bool(COMPILE.search(line))


def test_nodesafe_finds_nothing_severe_that_is_not_explained(severe):
    explained = {(file, category) for file, category, *_ in rows("nodesafe 0.6.0")}
    assert {
        (finding.file, finding.category) for finding in severe if not is_the_word_compile(finding)
    } == explained


def test_the_page_says_how_much_nodesafe_finds(severe):
    count = sum(not is_the_word_compile(finding) for finding in severe)
    assert f"| HIGH, all else | 17 | 7 | {count} |" in PAGE


def validated(folder) -> str:
    """What `comfy node validate` prints in a folder, with its telemetry off."""
    cli = installed("comfy-cli==1.23.0", complete=True)
    environment = {
        **os.environ, "PYTHONPATH": str(cli), "DO_NOT_TRACK": "1", "HOME": str(folder.parent),
        "XDG_CONFIG_HOME": str(folder.parent), "CI": "1"
    }
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", "validate"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.heavy
def test_comfy_node_validate_passes(tmp_path):
    for path in packed_files():
        (tmp_path / "pack" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "pack" / path)
    assert "All validation checks passed" in validated(tmp_path / "pack")
    (tmp_path / "pack" / "evaluated.py").write_text("print(eval('1 + 1'))\n")
    assert "Security warnings found" in validated(tmp_path / "pack")


def test_nothing_has_the_words_of_the_registrys_rules_that_is_not_explained():
    texts = sources()
    found = {(rule, path) for rule, pattern in RULES.items() for path, text in texts.items()
             if re.search(pattern, text)}
    found -= {("environment, read", path) for rule, path in found if rule == "environment, written"}
    assert len(texts) > 150
    explained = {(rule, file) for rule, file, *_ in rows("Words of the Registry's rules")}
    assert {item for item in found if item[0] not in TEXT_IN_A_MESSAGE} == explained


def test_advice_to_install_something_is_a_text_and_no_call():
    for path, text in sources().items():
        for line in text.splitlines():
            advises = re.search(RULES["installation"], line)
            assert not advises or re.search(r"""["'`#].*(pip install|ensurepip)""", line), (
                path,
                line,
            )


def test_one_call_starts_programs():
    assert [
        (path, text.count("Popen(")) for path, text in sources().items() if "Popen(" in text
    ] == [("child_process.py", 1)]


def test_the_package_holds_texts_and_pictures_alone():
    for path in packed_files():
        assert (ROOT / path).suffix in ENDINGS, path
        if not path.endswith((".jpg", ".png")):
            (ROOT / path).read_text(encoding="utf-8")


def test_every_explanation_is_whole():
    for row in (*rows("nodesafe 0.6.0"), *rows("Words of the Registry's rules")):
        assert len(row) == 4 and all(row), row
