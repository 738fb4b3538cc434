# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the figures of reliability.json into reliability.md. With --check, say whether it is out of date.

    reliability_table.py --record .bench/reliability.json     take the figures of a run of the scenario `cluster`, then write

The text around the generated part is written by hand and stays.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "docs" / "reliability.json"
BEGIN = "<!-- begin figures, written by docs/reliability_table.py -->"
END = "<!-- end figures -->"
PARTS = ("where", "steps", "runs", "planned", "faults")


def incomplete(figures: dict[str, Any]) -> list[str]:
    """What a record lacks to be published: each step of the scenario has to be in it, with its counts."""
    faults = [f"{part}: missing" for part in PARTS if not figures.get(part)]
    for part in ("planned", "faults"):
        for name, entry in figures.get(part, {}).items():
            faults += [f"{part}.{name}.{key}: missing" for key in ("title", "asked", "failed", "slowest_seconds") if key not in entry]
            if entry.get("failed", 0) > entry.get("asked", 0):
                faults.append(f"{part}.{name}: more questions failed than were asked")
    return faults


def missing(figures: dict[str, Any]) -> list[str]:
    """The steps of the scenario that this record has no figures of."""
    return [title for part in ("planned", "faults") for name, title in figures["steps"][part].items() if name not in figures[part]]


def row(*cells: Any) -> str:
    return "|" + "|".join(f" {cell} " if str(cell) else " " for cell in cells) + "|"


def number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else "–"


def changes(entry: dict[str, Any]) -> str:
    """What the next run of site.yml did, in words."""
    changed = entry.get("run_changed")
    if changed is None:
        return ""
    return "; ".join(f"{host}: {task}" for host, _colon, task in (text.partition(": ") for text in changed)).replace("|", "/") or "nothing"


def planned(figures: dict[str, Any]) -> list[str]:
    lines = ["### Planned changes", "", "| change | questions | failed | slowest, s | runs took, s | tasks changed |", "|" + "---|" * 6]
    lines += [
        row(entry["title"], entry["asked"], entry["failed"], number(entry["slowest_seconds"]), number(entry.get("seconds")), number(entry.get("changed")))
        for entry in figures["planned"].values()
    ]
    return [*lines, ""]


def faults(figures: dict[str, Any]) -> list[str]:
    broken = {name: entry for name, entry in figures["faults"].items() if not name.startswith("reboot-")}
    rebooted = {name: entry for name, entry in figures["faults"].items() if name.startswith("reboot-")}
    lines = ["### Faults", "", "| what breaks | mended by | questions | failed | answers again after, s | all well after, s | slowest, s | what the next "
             "`site.yml` changes |", "|" + "---|" * 8]  # fmt: skip
    for entry in broken.values():
        by = entry["mended_by"] + (f", after {number(entry['held_seconds'])} s" if entry["mended_by"] != "itself" else "")
        lines.append(row(f"{entry['title']} ({entry['victim']})", by, entry["asked"], entry["failed"], number(entry["answers_seconds"]),
                         number(entry["whole_seconds"]), number(entry["slowest_seconds"]), changes(entry)))  # fmt: skip
    head = "| host | questions | failed | went to another door | answers again after, s | all well after, s | slowest, s |"
    if rebooted:
        lines += ["", "### Every host rebooted, one after the other", "", head, "|" + "---|" * 7]
    for entry in rebooted.values():
        lines.append(row(entry["victim"], entry["asked"], entry["failed"], entry["other_door"], number(entry["answers_seconds"]),
                         number(entry["whole_seconds"]), number(entry["slowest_seconds"])))  # fmt: skip
    after = list(rebooted.values())[-1:]
    if after and "run_seconds" in after[0]:
        lines += ["", f"`site.yml` after all of them took {number(after[0]['run_seconds'])} s and changed {changes(after[0])}."]
    kinds: dict[str, int] = {}
    for entry in figures["faults"].values():
        for kind, count in entry.get("faults", {}).items():
            kinds[kind] = kinds.get(kind, 0) + count
    if kinds:
        lines += ["", "What came in the place of an answer, over all faults:", ""]
        lines += [f"* {count} × {kind.replace('|', '/')}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])]
    return [*lines, ""]


def timeline(figures: dict[str, Any]) -> list[str]:
    cold = figures["runs"].get("cold")
    if not cold:
        return []
    lines = ["### The first run, host by host", "", f"`site.yml` from bare hosts took {number(cold['seconds'])} s. Of its longer plays:", ""]
    lines += ["| play | hosts' work in sum, s | the longest host, s | took, s |", "|" + "---|" * 4]
    lines += [row(play, number(took["sum"]), number(took["longest"]), number(took["wall"])) for play, took in cold["plays"].items() if took["wall"] >= 5]
    lines += ["", "```text", *cold["picture"], "```", ""]
    again = figures["runs"].get("again")
    if again:
        most = max(again["round_trips"].values())
        what = f"changed {again['changed'] or 'nothing'}"
        lines += [f"Run again, it took {number(again['seconds'])} s, at most {most} module round trips on a host, and {what}.", ""]
    return lines


def section(figures: dict[str, Any]) -> str:
    if not figures:
        return "\n".join([BEGIN, "", "## Figures", "", "No whole run of the scenario has been recorded yet, so there are none.", "", END])
    where = figures["where"]
    told = (f"Measured on {where['date']}: {where['hosts']} lab hosts on one machine with {where['cores']} cores and {where['memory_gb']} GB, kernel "
            f"{where['kernel']}.")  # fmt: skip
    gaps = missing(figures)
    told += f" The run did not come to its end. Not measured: {'; '.join(gaps)}." if gaps else ""
    stood = f"Stand-ins instead of the real images: {', '.join(f'`{name}`' for name in where['stand_ins'])}." if where["stand_ins"] else "No stand-ins."
    return "\n".join([BEGIN, "", "## Figures", "", told, stood, "", *planned(figures), *faults(figures), *timeline(figures), END])


def page(text: str, figures: dict[str, Any]) -> str:
    return text[: text.index(BEGIN)] + section(figures) + text[text.index(END) + len(END) :]


def recorded() -> dict[str, Any]:
    """The figures that were taken last; empty before there were any."""
    return dict(json.loads(FIGURES.read_text(encoding="utf-8"))) if FIGURES.exists() else {}


def main() -> int:
    if "--record" in sys.argv:
        taken = json.loads(pathlib.Path(sys.argv[sys.argv.index("--record") + 1]).read_text(encoding="utf-8"))
        lacking = incomplete(taken)
        if lacking:
            print("\n".join(lacking))
            return 1
        FIGURES.write_text(json.dumps(taken, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures = recorded()
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text, figures)
    if text != wanted and "--check" in sys.argv:
        print("out of date: docs/reliability.md. Run python docs/reliability_table.py")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    print(f"docs/reliability.md: {'up to date' if text == wanted else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
