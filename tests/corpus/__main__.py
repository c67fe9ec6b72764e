"""Write the corpus into a folder, with its right outcomes in ``expected.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from tests.corpus.cases import cases


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    rows = []
    for case in cases():
        case.write(folder)
        rows.append({"name": case.name, "outcome": type(case.outcome).__name__, **dataclasses.asdict(case.outcome)})
    (folder / "expected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    print(f"{len(rows)} files in {folder}")


if __name__ == "__main__":
    main()
