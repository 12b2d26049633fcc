"""prefkit: build preference pairs, audit them, score the reference once, train with DPO.

The data goes down one road, and every step leaves what the next one needs on disk:

    sources -> pairs -> validate -> decontaminate -> dedupe -> split -> STORE -> audit, repair
                                                                          |
                                                                          +-> encode -> reference -> gate -> train
                                                                          +-> query, export

Words, without input or output: `errors`, `format` (the layout on disk), `records` (what a user may hand us), `text`.
Pure functions on Polars frames: `screen`, `formats`, `pairs`, `corrections`, `comparisons`, `quality`, `pairing`,
`selection`, `grams`, `minhash`, `buckets`, `decontaminate`, `keys`, `validate`, `cycles`, `dedupe`, `split`, `audit`.
Files: `documents`, `sections`, `build_settings`, `train_settings`, `settings`, `config`, `rows`, `checked`, `shapes`,
`plans`, `ingest`, `sources`, `detection`, `evals`, `views`, `store`, `tables`, `locks`, `spill`, `ahead`, `workers`,
`near`, `comparing`, `candidates`, `rewriting`, `rejecting`, `drafts`, `target`, `accounts`, `assembly`, `additions`,
`papers`, `resolving`, `build`, `query`, `spans`, `show`, `export`, `curves`, `info`, `run_facts`, `run_charts`,
`run_page`, `schemas`. Below the torch line: `conversations`, `controls`, `encode`, `adapters`, `identity`, `lora`,
`models`, `boundaries`, `judgement`, `audits`, `report`, `openers`, `mending`, `repairs`, `packing`, `attention`,
`head`, `logps`, `layouts`, `batches`, `budget`, `work`, `processes`, `scoring`, `reference`, `losses`, `metrics`,
`optimizers`, `schedule`, `perf`, `compiling`, `signs`, `gate`, `sharding`, `checkpoint`, `best`, `run`, `trackers`,
`run_log`, `updates`, `policy`, `job`, `train`. The edge: `terminal`, `sides`, `before_after`, `sparklines`,
`run_view`, `stopping`, `demo`, `cli`.

Each command is one function here, imported on first use so that `import prefkit` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefkit.audits import audit_dataset as audit_dataset
    from prefkit.build import build_dataset as build_dataset
    from prefkit.config import load_pipeline as load_pipeline
    from prefkit.export import export_dataset as export_dataset
    from prefkit.info import dataset_info as dataset_info
    from prefkit.query import query_dataset as query_dataset
    from prefkit.reference import precompute_reference as precompute_reference
    from prefkit.repairs import repair_dataset as repair_dataset
    from prefkit.run_page import write_run_page as write_run_page
    from prefkit.show import show_pairs as show_pairs
    from prefkit.target import pipeline_of as pipeline_of
    from prefkit.train import train_dpo as train_dpo

_HOMES = {
    "audit_dataset": "prefkit.audits",
    "build_dataset": "prefkit.build",
    "dataset_info": "prefkit.info",
    "export_dataset": "prefkit.export",
    "load_pipeline": "prefkit.config",
    "pipeline_of": "prefkit.target",
    "precompute_reference": "prefkit.reference",
    "query_dataset": "prefkit.query",
    "repair_dataset": "prefkit.repairs",
    "show_pairs": "prefkit.show",
    "train_dpo": "prefkit.train",
    "write_run_page": "prefkit.run_page",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - the names are literal strings


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'prefkit' has no attribute {name!r}")
