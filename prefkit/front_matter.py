"""The YAML on top of a dataset's card: what the Hugging Face hub and `datasets` read of it.

Comes in: the manifest, the audit and the references of a dataset. Goes out: its configs (a table each, by file), the
number of rows of each split, the license, and the keys that the hub finds a dataset by. Names are data: whatever one of
YAML's versions could take for something else is quoted.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeAlias

import yaml

from prefkit.format import REFERENCES, SPLITS, part_split
from prefkit.text import visible

Entry: TypeAlias = Mapping[str, Any]
Files: TypeAlias = list[tuple[str, int]]  # paths below the dataset, and their rows

# https://huggingface.co/docs/hub/repositories-licenses: the hub takes no other; what is not here is `other`, by name
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0
odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma
unknown other
"""
HUB_LICENSES = frozenset(LICENSES.split())
MOST_PATHS = 100
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# a word that no reader of YAML takes for anything but text
PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf)$)[a-z][a-z0-9_]*(?:[./-][a-z0-9_]+)*")
CONFIGS: Mapping[str, str] = {
    "pairs": "only pairs fit to train on; `test`: those held out, by prompt",
    "dropped": "what a named rule removed, and why",
    "rejects": "lines of the sources that could not become a record, raw",
    "changes": "what a repair did to which pair, and why",
    "tokens": "how often each word or n-gram is in chosen only, in rejected only, in both",
    "structure": "length, markup, openers, endings, generators: which side has more",
    "probe": "how far shallow features alone predict chosen",
    "pair_scores": "by pair: how much of it they give away",
    "reference": "a split a key: what the reference model scores each pair, and the token ids it was scored on",
}


class CardFacts(NamedTuple):
    """What a card is made of: documents as documents.py describes them; `audit`: None before the first one."""

    manifest: Entry
    audit: Entry | None
    references: Sequence[Entry]  # by key


def metadata(facts: CardFacts) -> dict[str, Any]:
    """What the YAML says: the keys of the hub's dataset cards, and the configs of `datasets`."""
    counts, told = facts.manifest["counts"], facts.manifest["pipeline"].get("card") or {}
    configs = configs_of(facts)
    return {
        "pretty_name": visible(told.get("pretty_name") or "Preference pairs"),
        **({"language": told["language"]} if told.get("language") else {}),
        **license_of(told.get("license"), [source["license"] for source in facts.manifest["sources"]]),
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "prefkit"],
        "size_categories": [next((name for most, name in SIZES if counts["pairs"] < most), "n>10M")],
        "configs": [
            {
                "config_name": config,
                **({"default": True} if config == "pairs" else {}),
                "data_files": [{"split": split, "path": _paths(files)} for split, files in splits.items()],
            }
            for config, splits in configs.items()
        ],
        # with the number of rows `datasets` refuses a part that has lost some; it wants a size, and uses none
        "dataset_info": [
            {
                "config_name": config,
                "splits": [
                    {"name": split, "num_bytes": 0, "num_examples": sum(rows for _, rows in files)}
                    for split, files in splits.items()
                ],
            }
            for config, splits in configs.items()
        ],
    }


def configs_of(facts: CardFacts) -> dict[str, dict[str, Files]]:
    """Config to split to files. `datasets` cannot load a split without rows: it is left out, but for pairs.

    A table whose rows are of no split has one split of its own name, so that nothing but pairs is ever `train`.
    """
    tables = facts.manifest["parts"]
    found: dict[str, dict[str, Files]] = {}
    of_split = {split: [part for part in tables["pairs"] if part_split(part["file"]) == split] for split in SPLITS}
    found["pairs"] = {split: _files("pairs", parts) for split, parts in of_split.items() if parts}
    for table in ("dropped", "rejects", "changes"):
        found[table] = {table: _files(table, [part for part in tables.get(table, []) if part["rows"]])}
    for part in facts.audit["parts"] if facts.audit else []:
        name = PurePath(part["file"]).stem
        found[name] = {name: _files("audit", [part] if part["rows"] else [])}
    found["reference"] = {one["key"]: _files(f"{REFERENCES}/{one['key']}", one["parts"]) for one in facts.references}
    whole = {config: {split: files for split, files in of.items() if files} for config, of in found.items()}
    return {config: whole[config] for config in CONFIGS if whole.get(config)}


def _paths(files: Files) -> list[str]:
    """The files by name, so that a missing one is missed; of very many their pattern, and the rows are counted."""
    names = [path for path, _ in files]
    return names if len(names) <= MOST_PATHS else sorted({re.sub(r"\d+(?=\.parquet$)", "*", name) for name in names})


def _files(folder: str, parts: Iterable[Entry]) -> Files:
    return [(f"{folder}/{part['file']}", part["rows"]) for part in parts]


def license_of(told: str | None, of_sources: Sequence[str | None]) -> dict[str, str]:
    """The hub's license keys: what the pipeline says of the whole, or what all sources have alike, or `other`."""
    named = {told} if told else {name or None for name in of_sources}
    if named <= {None}:
        return {}
    ids = {(hub_license(name) or name.lower()) if name else None for name in named}
    if len(ids) > 1:
        return {"license": "other", "license_name": "mixed"}
    one = str(ids.pop())
    if one in HUB_LICENSES:
        return {"license": one}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", one)[:80].strip("-.") or "see-below"}


def hub_license(name: str) -> str | None:
    """The hub's id of a licence, also of an SPDX id (`GPL-3.0-or-later`) or with spaces (`CC BY 4.0`); None: no such.

    Args:
        name: as the pipeline has it.
    """
    folded = re.sub(r"\s+", "-", name.strip().lower()).removesuffix("-only").removesuffix("-or-later")
    return folded if folded in HUB_LICENSES else None


class _Dumper(yaml.SafeDumper):
    """YAML with every text quoted that one of YAML's versions could take for something else (12e3 is a number)."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - asked of each value: none becomes *id001
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if PLAIN.fullmatch(text) else '"')


_Dumper.add_representer(str, _text)


def front_matter(told: Mapping[str, Any]) -> str:
    """The YAML between its two lines of dashes."""
    return f"---\n{yaml.dump(told, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)}---\n"
