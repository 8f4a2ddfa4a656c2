"""Real text that every Python has: the language reference in ``pydoc_data.topics``, as JSONL.

python -m retrodb.corpus.quickstart quickstart-corpus.jsonl
"""

import json
import sys
from pathlib import Path
from pydoc_data import topics


def quickstart_lines() -> list[str]:
    """One JSON line a topic, in alphabetical order."""
    return [
        json.dumps({"id": name, "title": _title(name, text), "text": text}, ensure_ascii=False)
        for name, text in sorted(topics.topics.items())
    ]


def _title(name: str, text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), name)


def main() -> None:
    """Write the corpus to the file named on the command line, unless it is there with just that content."""
    path = Path(sys.argv[1])
    content = "\n".join(quickstart_lines()) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
