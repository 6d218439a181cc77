"""Which opcode forms some translations have used: coverage.py FORMS.json… prints each form, and exits with 1 if an alternative was left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forms_machine  # noqa: F401  (adds its forms)
from forms import all_forms


def main() -> int:
    forms = {f.pattern: f for f in all_forms()}
    for path in sys.argv[1:]:
        for pattern, seen in json.loads(Path(path).read_text()).items():
            f = forms[pattern]
            f.used = True
            for mine, theirs in zip(f.seen, seen):
                mine.update(theirs)
    for f in forms.values():
        print(("covered  " if not f.missing() else "MISSING  ") + f.pattern)
    missing = [m for f in forms.values() for m in f.missing()]
    print(f"{len(forms)} forms, {sum(len(c) for f in forms.values() for c, _ in f.choices)} alternatives, {len(missing)} of them not covered")
    print("\n".join(f"  {m}" for m in missing))
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
