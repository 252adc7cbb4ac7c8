"""docs/troubleshooting.md quotes messages that the sources really have."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"


def _files() -> list[str]:
    """The strings of each source, a line for each; what is computed, or put in by a format, is `VARIES`."""
    found = []
    for path in (path for folder in ("pretrain", "data_tools", "megatron_qsparse", "tools") for path in (ROOT / folder).rglob("*.py")):
        texts = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]", VARIES, node.value))
        found.append("\n".join(texts))
    return [*found, *(path.read_text() for folder in ("tools", "slurm") for path in (ROOT / folder).rglob("*.sh"))]


def _messages() -> list[str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


FILES = _files()


@pytest.mark.parametrize("message", _messages())
def test_every_quoted_message_is_in_the_sources(message):
    """All its parts in one file: a message may be put together from several strings."""
    parts = [part for part in message.split(VARIES) if len(part) > 3]
    assert parts, "nothing to look for"
    assert any(all(part in text for part in parts) for text in FILES)
