"""prefkit: build preference pairs, audit them, score the reference once, train with DPO.

The data goes down one road, and every step leaves what the next one needs on disk:

    sources -> pairs -> validate -> decontaminate -> dedupe -> split -> STORE -> audit, repair
                                                                          |
                                                                          +-> encode -> reference -> gate -> train
                                                                          +-> query, export

Words, without input or output: `errors`, `format` (the layout on disk), `sample_format` (of sampled candidates),
`records` (what a user may hand us), `text`.
Pure functions on Polars frames: `screen`, `formats`, `pairs`, `corrections`, `comparisons`, `quality`, `pairing`,
`selection`, `grams`, `minhash`, `buckets`, `decontaminate`, `keys`, `validate`, `cycles`, `dedupe`, `split`, `audit`,
`intervals`, `diversity`, `win_rates`, `measures`, `verifiers`.
Files: `documents`, `sections`, `build_settings`, `train_settings`, `sample_settings`, `settings`, `config`, `rows`,
`checked`, `shapes`, `plans`, `ingest`, `sources`, `detection`, `evals`, `views`, `store`, `target`, `combinations`,
`tables`, `reference_table`, `evaluation_tables`, `locks`, `prompts`, `candidate_folder`, `scorer_options`,
`scored_folder`, `spill`, `ahead`, `workers`, `near`, `comparing`, `candidates`, `functions`, `preflight`, `rewriting`,
`rejecting`, `drafts`, `accounts`, `assembly`, `additions`, `front_matter`, `card`, `papers`, `verification`,
`resolving`, `build`, `guard`, `query`, `results`, `spans`, `show`, `row_files`, `scored_rows`, `export`, `curves`,
`info`, `run_facts`, `holdings`, `dataset`, `run_charts`, `run_page`, `schemas`. Below the torch line: `conversations`,
`controls`, `encode`, `adapters`, `identity`, `lora`, `models`, `boundaries`, `judgement`, `audits`, `report`,
`openers`, `mending`, `repairs`, `packing`, `attention`, `head`, `logps`, `layouts`, `batches`, `budget`, `work`,
`processes`, `scoring`, `reference`, `stops`, `picking`, `arena`, `engines`, `generation`, `sample_work`, `sample`,
`reward_models`, `judge`, `scorers`, `score`, `losses`, `metrics`, `optimizers`, `schedule`, `completions`, `perf`,
`compiling`, `signs`, `gate`, `sharding`, `checkpoint`, `best`, `run`, `trackers`, `run_log`, `updates`, `policy`,
`job`, `train`, `perplexity`, `held_out`, `evaluation_plan`, `evaluation_work`, `evaluate`, `stages`, `sweep`, `road`,
`integrations`. The edge: `terminal`, `grid`, `evaluation_view`, `sides`, `before_after`, `sparklines`, `run_view`,
`stopping`, `road_view`, `demo`, `output`, `options`, `data_commands`, `model_commands`, `cli`.

Each command is one function here, and so is what a user of them names; imported on first use, so that
`import prefkit` stays light. docs/api.md lists them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefkit.audit.verdict import Finding as Finding
    from prefkit.audits import audit_dataset as audit_dataset
    from prefkit.audits import enforce_audit as enforce_audit
    from prefkit.build import Built as Built
    from prefkit.build import build_dataset as build_dataset
    from prefkit.config import load_pipeline as load_pipeline
    from prefkit.curves import Curves as Curves
    from prefkit.dataset import Dataset as Dataset
    from prefkit.dataset import open_dataset as open_dataset
    from prefkit.demo.walk import run_demo as run_demo
    from prefkit.errors import AuditError as AuditError
    from prefkit.errors import CheckError as CheckError
    from prefkit.errors import ConfigError as ConfigError
    from prefkit.errors import DatasetError as DatasetError
    from prefkit.errors import GateError as GateError
    from prefkit.errors import InputError as InputError
    from prefkit.errors import Interrupted as Interrupted
    from prefkit.errors import MachineError as MachineError
    from prefkit.errors import ModelError as ModelError
    from prefkit.errors import PrefkitError as PrefkitError
    from prefkit.errors import SourceError as SourceError
    from prefkit.evaluate import Evaluated as Evaluated
    from prefkit.evaluate import evaluate_model as evaluate_model
    from prefkit.export import Exported as Exported
    from prefkit.export import export_dataset as export_dataset
    from prefkit.formats import list_formats as list_formats
    from prefkit.holdings import DatasetAudit as DatasetAudit
    from prefkit.holdings import DatasetReference as DatasetReference
    from prefkit.holdings import DatasetRun as DatasetRun
    from prefkit.info import dataset_info as dataset_info
    from prefkit.info import read_runs as read_runs
    from prefkit.integrations.pair_stream import PairStream as PairStream
    from prefkit.integrations.pytorch import PairCollator as PairCollator
    from prefkit.integrations.pytorch import PairDataset as PairDataset
    from prefkit.integrations.pytorch import torch_dataset as torch_dataset
    from prefkit.integrations.pytorch import torch_stream as torch_stream
    from prefkit.judgement import Audited as Audited
    from prefkit.query import list_views as list_views
    from prefkit.query import query_dataset as query_dataset
    from prefkit.reference import Estimated as Estimated
    from prefkit.reference import Precomputed as Precomputed
    from prefkit.reference import estimate_reference as estimate_reference
    from prefkit.reference import precompute_reference as precompute_reference
    from prefkit.repairs import Repaired as Repaired
    from prefkit.repairs import repair_dataset as repair_dataset
    from prefkit.results import write_query as write_query
    from prefkit.road import RunThrough as RunThrough
    from prefkit.road import run_pipeline as run_pipeline
    from prefkit.run import Trained as Trained
    from prefkit.run_page import RunPage as RunPage
    from prefkit.run_page import write_run_page as write_run_page
    from prefkit.sample import Sampled as Sampled
    from prefkit.sample import sample_candidates as sample_candidates
    from prefkit.score import ScoredBy as ScoredBy
    from prefkit.score import score_candidates as score_candidates
    from prefkit.settings import Pipeline as Pipeline
    from prefkit.show import Shown as Shown
    from prefkit.show import show_pairs as show_pairs
    from prefkit.stages import Outcome as Outcome
    from prefkit.stages import Spectator as Spectator
    from prefkit.sweep import Swept as Swept
    from prefkit.sweep import sweep_pipeline as sweep_pipeline
    from prefkit.target import pipeline_of as pipeline_of
    from prefkit.train import train_dpo as train_dpo

_HOMES = {
    "AuditError": "prefkit.errors",
    "Audited": "prefkit.judgement",
    "Built": "prefkit.build",
    "CheckError": "prefkit.errors",
    "ConfigError": "prefkit.errors",
    "Curves": "prefkit.curves",
    "Dataset": "prefkit.dataset",
    "DatasetAudit": "prefkit.holdings",
    "DatasetError": "prefkit.errors",
    "DatasetReference": "prefkit.holdings",
    "DatasetRun": "prefkit.holdings",
    "Estimated": "prefkit.reference",
    "Evaluated": "prefkit.evaluate",
    "Exported": "prefkit.export",
    "Finding": "prefkit.audit.verdict",
    "GateError": "prefkit.errors",
    "InputError": "prefkit.errors",
    "Interrupted": "prefkit.errors",
    "MachineError": "prefkit.errors",
    "ModelError": "prefkit.errors",
    "Outcome": "prefkit.stages",
    "PairCollator": "prefkit.integrations.pytorch",
    "PairDataset": "prefkit.integrations.pytorch",
    "PairStream": "prefkit.integrations.pair_stream",
    "Pipeline": "prefkit.settings",
    "Precomputed": "prefkit.reference",
    "PrefkitError": "prefkit.errors",
    "Repaired": "prefkit.repairs",
    "RunPage": "prefkit.run_page",
    "Sampled": "prefkit.sample",
    "ScoredBy": "prefkit.score",
    "RunThrough": "prefkit.road",
    "Shown": "prefkit.show",
    "SourceError": "prefkit.errors",
    "Spectator": "prefkit.stages",
    "Swept": "prefkit.sweep",
    "Trained": "prefkit.run",
    "audit_dataset": "prefkit.audits",
    "build_dataset": "prefkit.build",
    "dataset_info": "prefkit.info",
    "enforce_audit": "prefkit.audits",
    "estimate_reference": "prefkit.reference",
    "evaluate_model": "prefkit.evaluate",
    "export_dataset": "prefkit.export",
    "list_formats": "prefkit.formats",
    "list_views": "prefkit.query",
    "load_pipeline": "prefkit.config",
    "open_dataset": "prefkit.dataset",
    "pipeline_of": "prefkit.target",
    "precompute_reference": "prefkit.reference",
    "query_dataset": "prefkit.query",
    "read_runs": "prefkit.info",
    "repair_dataset": "prefkit.repairs",
    "run_demo": "prefkit.demo.walk",
    "sample_candidates": "prefkit.sample",
    "score_candidates": "prefkit.score",
    "run_pipeline": "prefkit.road",
    "show_pairs": "prefkit.show",
    "sweep_pipeline": "prefkit.sweep",
    "torch_dataset": "prefkit.integrations.pytorch",
    "torch_stream": "prefkit.integrations.pytorch",
    "train_dpo": "prefkit.train",
    "write_query": "prefkit.results",
    "write_run_page": "prefkit.run_page",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - the names are literal strings


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'prefkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_HOMES, *(name for name in globals() if name.startswith("__"))})
