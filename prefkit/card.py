"""The README.md inside a dataset: its YAML (front_matter.py), then the same for a person.

Comes in: the manifest, the audit and the references of a dataset. Goes out: one text, the same whenever these are.
Names of files, tokens and models are data: they stand as code in cells of tables, and no sign in them is markup. An
absolute path is shown by its last part only: a card is what is handed around.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from prefkit.format import AUDIT_JSON, MANIFEST
from prefkit.front_matter import CONFIGS, CardFacts, Entry, Files, configs_of, front_matter, metadata
from prefkit.text import visible

SHOWN_FINDINGS, LONGEST_NAME = 20, 200


def dataset_card(facts: CardFacts) -> str:
    """The whole card."""
    counts, audit, references = facts.manifest["counts"], facts.audit, facts.references
    told = facts.manifest["pipeline"].get("card") or {}
    title = visible(told.get("pretty_name") or "Preference pairs")
    sections = [
        f"# {as_text(title)}",
        f"{counts['pairs']} pairs ({facts.manifest['kind']}): {counts['train']} train, {counts['test']} test. "
        f"Built by prefkit {facts.manifest['prefkit_version']}.",
        _loading(configs_of(facts)),
        _counts(facts.manifest),
        _sources(facts.manifest),
        "## Audit\n\n" + (_audit(audit) if audit else "None yet: `prefkit audit DATASET`."),
        "## References\n\n" + (_references(references) if references else "None yet: `prefkit precompute DATASET`."),
        *([_repair(facts.manifest["repair"])] if facts.manifest.get("repair") else []),
        f"`{MANIFEST}` holds the settings and the sha256 of every part. `datasets`, DuckDB and Polars compare none of "
        "them;\n`prefkit info DATASET --verify` does.",
    ]
    return front_matter(metadata(facts)) + "\n" + "\n\n".join(sections) + "\n"


def as_text(text: str) -> str:
    """A text that Markdown shows as it is: its signs are no markup."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def as_code(text: str) -> str:
    """A text as code in a cell of a table, whatever it holds: no markup, no link, no further cell."""
    shown = _cut(visible(text))
    if not re.search(r"[`|\\]", shown):
        return f"` {shown} `" if shown.startswith(" ") and shown.endswith(" ") and shown.strip() else f"`{shown}`"
    # renderers do not agree on these signs in a table: as numbers they are none of them
    return "<code>" + re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", shown) + "</code>"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "\u2026"


def shown_path(path: str) -> str:
    """A path as code: as it is where it is relative, else its last part."""
    return as_code(PurePath(path).name if PurePath(path).is_absolute() else path)


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def _loading(configs: Mapping[str, Mapping[str, Files]]) -> str:
    first = next(iter(configs["pairs"]))
    lines = [f'pairs = load_dataset("DATASET", split="{first}")']
    lines += ['dropped = load_dataset("DATASET", "dropped", split="dropped")'] if "dropped" in configs else []
    if "reference" in configs:
        key = next(iter(configs["reference"]))
        lines.append(f'reference = load_dataset("DATASET", "reference", split="{key}")  # join on pair_id')
    rows = [
        (f"`{config}`", ", ".join(f"`{split}` {sum(n for _, n in files)}" for split, files in splits.items()), about)
        for config, about in CONFIGS.items()
        if (splits := configs.get(config))
    ]
    return (
        "## Load it\n\n`DATASET` is the path of this directory; for `load_dataset` also the name that it was uploaded "
        "under.\n\n```python\nfrom datasets import load_dataset\n\n" + "\n".join(lines) + "\n```\n\n"
        f'```python\nimport polars as pl\n\npairs = pl.read_parquet("DATASET/pairs/part-{first}-*.parquet")\n```\n\n'
        "```sh\nprefkit info DATASET --verify   # whether every part is as it was written\n"
        "cd DATASET && duckdb -init views.sql   # a view a table\n```\n\n"
        + _table(("config", "splits and rows", ""), rows)
        + "\n\nA table that is not listed has no rows."
    )


def _counts(manifest: Entry) -> str:
    names = ["rows", "candidates", "prompts", "pairs", "dropped", "rejects", "unused"]
    shown = [(name, manifest["counts"][name]) for name in names if manifest["counts"][name]]
    text = "## Counts\n\n" + _table(("", "number"), shown)
    if manifest["reasons"]:
        reasons = [(as_code(reason), count) for reason, count in manifest["reasons"].items()]
        text += "\n\n" + _table(("dropped or rejected because", "rows"), reasons)
    if manifest["unused"]:
        text += "\n\n" + _table(
            ("candidates unused because", "candidates"), [(as_code(name), n) for name, n in manifest["unused"].items()]
        )
    return text


def _sources(manifest: Entry) -> str:
    rows = [
        (
            shown_path(file["path"]),
            file["format"],
            file["rows"],
            as_code(file["license"]) if file["license"] else "not told",
            f"`{file['sha256']}`",
        )
        for file in manifest["sources"]
    ]
    text = "## Sources\n\n" + _table(("source", "format", "rows", "license", "sha256"), rows)
    if manifest["evals"]:
        evals = [(shown_path(file["path"]), file["rows"], f"`{file['sha256']}`") for file in manifest["evals"]]
        text += "\n\nPairs that hold an item of these files were dropped:\n\n"
        text += _table(("evaluation file", "items", "sha256"), evals)
    return text


def _audit(audit: Entry) -> str:
    text = f"Verdict: **{audit['verdict']}**, over {audit['pairs']} pairs"
    text += " (strict)." if audit["strict"] else "."
    if not audit["findings"]:
        return text + f" No findings. All of it: `{AUDIT_JSON}`."
    rows = [
        (
            one["level"],
            one["family"],
            as_code(one["name"]),
            one["side"] or "",
            "" if one["num_pairs"] is None else one["num_pairs"],
            _percent(one["coverage"]),
            _percent(one["win_rate"]),
        )
        for one in audit["findings"][:SHOWN_FINDINGS]
    ]
    names = ("level", "family", "finding", "more of it in", "pairs", "of all pairs", "win rate")
    more = len(audit["findings"]) - len(rows)
    return (
        f"{text} What gives chosen away:\n\n{_table(names, rows)}\n\n"
        + (f"And {more} more; all of it: `{AUDIT_JSON}`." if more else f"All of it: `{AUDIT_JSON}`.")
        + " Win rate: the share of these pairs in which chosen has\nmore of it; of a probe, the held-out pairs that it "
        "gets right."
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _references(references: Sequence[Entry]) -> str:
    names = ("key", "model", "max_length", "dtype", "pairs", "dropped", "weights sha256", "chat template sha256")
    rows = [
        (
            f"`{one['key']}`",
            as_code(one["provenance"]["model"]) if one["provenance"].get("model") else "",
            one["identity"]["max_length"],
            one["identity"]["dtype"],
            sum(part["rows"] for part in one["parts"]),
            one["dropped"]["rows"],
            f"`{one['identity']['weights_sha256']}`",
            f"`{one['identity']['chat_template_sha256']}`" if one["identity"]["chat_template_sha256"] else "",
        )
        for one in references
    ]
    return (
        "Log-probabilities of both sides under a reference model, summed over the completion's tokens, in nats.\n\n"
        + _table(names, rows)
        + "\n\nTokenizer, truncation and versions: `reference/<key>/reference.json`. A reference holds the pairs of "
        "both splits:\njoin on `pair_id`."
    )


def _repair(repair: Entry) -> str:
    names = ("repair", "setting", "pairs dropped", "pairs edited", "of them dropped later")
    rows = [
        (s["repair"], as_code(str(s["setting"])), s["dropped"], s["edited"], s["dropped_later"])
        for s in repair["steps"]
    ]
    return (
        f"## Repaired\n\nThe pairs are those of {shown_path(repair['dataset'])} after these repairs, by "
        f"`prefkit repair`:\n\n{_table(names, rows)}\n\n"
        "`changes/` holds a row for each of these pairs: what was done, and why. A pair that was not edited keeps its\n"
        "`pair_id`: a reference that was copied is still right for it, and `prefkit precompute` scores the others."
    )
