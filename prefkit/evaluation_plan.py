"""What an evaluation is of, known before a model runs: folders, identities, where responses and figures go.

Comes in: what the user named, and settings. Goes out: a `Plan`, whose key hashes everything that decides a figure; so a
finished evaluation is known again, and evaluations of several runs find the same folder of responses.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefkit.config import TrainConfig
from prefkit.curves import is_run
from prefkit.documents import Run
from prefkit.encode import resolve_template
from prefkit.errors import ConfigError, DatasetError, InputError, SourceError
from prefkit.format import (
    EVALUATIONS,
    MANIFEST,
    MODEL,
    REFERENCES,
    RUN_JSON,
    RUNS,
    SAMPLED,
    Kind,
    reference_key,
)
from prefkit.identity import identity_sha256, policy_identity, template_sha256
from prefkit.models import load_tokenizer, positions_of
from prefkit.prompts import is_dataset, prompts_kind, refuse_split
from prefkit.reference_table import pick_reference
from prefkit.sample_settings import EvaluateConfig, PromptsConfig, SampleConfig
from prefkit.schedule import beta_at
from prefkit.scorers import open_scorer
from prefkit.settings import Pipeline
from prefkit.sources import expand, file_sha256
from prefkit.store import list_references, read_document, read_manifest
from prefkit.work import TEMPLATE_FILE

POLICY, REFERENCE, OTHER = "policy", "reference", "other"


class Wanted(NamedTuple):
    """What a pipeline says of its evaluation: its newest finished run, and settings with scorers."""

    run: Path
    settings: EvaluateConfig
    reference: str | None
    chat_template: str | None


class Model(NamedTuple):
    """A model that is sampled: its folder as it was named, and its identity."""

    folder: str
    identity: dict[str, Any]


class Held(NamedTuple):
    """The dataset behind an evaluation: its place, manifest, and the reference that held-out pairs are scored against.

    `key` and `recorded` are None where it has none, or several and nothing says which.
    """

    folder: Path
    manifest: dict[str, Any]
    key: str | None
    recorded: dict[str, Any] | None


class Plan(NamedTuple):
    """All that an evaluation has to do; `template`: a setting, as a name or file.

    `run`: run.json of the run whose model it is, else None, and `trained_on` its dataset, if that is there;
    `no_reference`: why what would be the reference is not it; `home`: the run's directory, or --out; `samples`: where
    folders of responses lie.
    """

    key: str
    identity: dict[str, Any]
    settings: EvaluateConfig
    models: dict[str, Model]
    held: Held | None
    no_reference: str | None
    run: dict[str, Any] | None
    trained_on: Path | None
    kind: Kind
    template: str | None
    home: Path
    samples: Path

    @property
    def folder(self) -> Path:
        """Of the evaluation itself."""
        return self.home / EVALUATIONS / self.key

    def positions(self, roles: Iterable[str]) -> int | None:
        """Tokens that all of these models have positions for."""
        found = [positions_of(self.models[role].identity["config"]) for role in roles]
        return min((one for one in found if one is not None), default=None)


def pipeline_wants(pipeline: Pipeline) -> Wanted:
    """What `prefkit evaluate PIPELINE` evaluates.

    Raises:
        ConfigError: the pipeline has no evaluate section.
        DatasetError: there is no finished run.
    """
    if pipeline.evaluate is None:
        raise ConfigError("the pipeline has no evaluate section", where="evaluate", expected="evaluate: with prompts")
    runs = [path for path in (Path(pipeline.dataset) / RUNS).glob("*") if path.name.isdigit() and is_run(path)]
    newest = sorted(runs, key=lambda path: int(path.name), reverse=True)
    run = next((path for path in newest if read_document(path / RUN_JSON, Run)["finished"]), None)
    if run is None:
        raise DatasetError("holds no finished run", where=pipeline.dataset, hint="prefkit train PIPELINE")
    settings = with_scorers(pipeline.evaluate, pipeline)
    return Wanted(run, settings, pipeline.precompute.model, pipeline.precompute.chat_template)


def with_scorers(settings: EvaluateConfig, pipeline: Pipeline) -> EvaluateConfig:
    """The settings with the scorers of the pipeline's score section, where they name none."""
    if settings.scorers or pipeline.score is None:
        return settings
    return settings.model_copy(update={"scorers": list(pipeline.score.scorers)})


def make_plan(
    model: str | Path,
    settings: EvaluateConfig,
    *,
    reference: str | Path | None,
    usual: str | Path | None = None,
    dataset: str | Path | None,
    out: str | Path | None,
    kind: Kind | None,
    chat_template: str | None,
) -> Plan:
    """Find what is evaluated, hash it, and say where it all goes.

    Args:
        model: folder of a model, or of a run.
        settings: of the evaluation.
        reference: folder of the model to compare with; None: the setting's, or the dataset's.
        usual: what a pipeline says of its reference: taken before the dataset's where it is the one that was scored.
        dataset: whose held-out pairs it is measured on; None: the run's.
        out: where it goes; None: into the run.
        kind: of the prompts; None: the dataset's, or by what they are.
        chat_template: as precompute.chat_template; None: the dataset's reference's, or the tokenizer's own.

    Raises:
        ModelError, DatasetError: what is named is not there, or not finished.
        InputError: nothing says where the evaluation goes.
        SourceError: prompts or texts are not what can be asked.
    """
    _refuse_no_model(Path(model))
    settings = settings.model_copy(update={"prompts": _unseen(settings.prompts)})
    if settings.texts is not None and is_dataset(settings.texts):
        raise SourceError(
            "evaluate.texts: a dataset has no references",
            where=settings.texts.path,
            expected="a file of prompt, reference",
        )
    run = Path(model) if is_run(model) else None
    around = run or _run_around(Path(model))
    made = None if around is None else read_document(around / RUN_JSON, Run)
    own = None if around is None or made is None else _dataset_of(around, made)
    recorded = made if run is not None else None
    folder = _model_of(Path(model), recorded)
    home = Path(out) if out is not None else run
    if home is None:
        raise InputError(
            "a model that is no run has no place for its evaluation", where=str(model), expected="--out DIR"
        )
    held = _held(recorded, dataset or (own if run is not None else None))
    template = chat_template or _template_of(held)
    kind = kind or (held.manifest["kind"] if held else None) or _kind_of(settings.prompts, template, folder)
    models, no_reference = {POLICY: _identified(str(folder), kind, template)}, None
    if compared := reference or settings.reference:
        models[REFERENCE] = _identified(str(compared), kind, template)
    else:
        found, no_reference = _reference_of(held, recorded, usual, kind, template)
        models |= {REFERENCE: found} if found is not None else {}
    if settings.against not in ("reference", "chosen"):
        models[OTHER] = _identified(settings.against, kind, template)
    scorers = {config.label: open_scorer(config, kind).identity for config in settings.scorers}
    identity = _identity(settings, models, held, made, scorers)
    near = run is not None and out is None and held is not None and run.resolve().parent.parent == held.folder.resolve()
    samples = held.folder / SAMPLED if near and held is not None else home / SAMPLED
    key = reference_key(identity)
    return Plan(key, identity, settings, models, held, no_reference, made, own, kind, template, home, samples)


def _refuse_no_model(path: Path) -> None:
    if not path.exists():
        raise InputError("no such model and no such run", where=str(path), expected="the folder of a model or of a run")
    if (path / MANIFEST).exists():
        expected = f"the folder of a model or of a run, such as {path / RUNS / '1'}"
        raise InputError("is a dataset, no model", where=str(path), expected=expected)


def _model_of(path: Path, recorded: dict[str, Any] | None) -> Path:
    if recorded is None:
        return path
    if not recorded["finished"]:
        raise DatasetError("is not finished", where=str(path), expected="a finished run", hint="prefkit train goes on")
    return path / MODEL


def _kind_of(prompts: PromptsConfig, template: str | None, folder: Path) -> Kind:
    """Chat where there is a chat template to ask with, or the prompts are messages."""
    own = load_tokenizer(folder).chat_template
    return prompts_kind(prompts, None, has_template=template is not None or own is not None)


def _dataset_of(run: Path, recorded: Mapping[str, Any]) -> Path | None:
    """The dataset that a run lies in, or says it was trained on, if that is there."""
    around = run.resolve().parent.parent
    place = run.parent.parent if (around / MANIFEST).exists() else Path(recorded["dataset"])
    return place if (place / MANIFEST).exists() else None


def _held(recorded: dict[str, Any] | None, dataset: str | Path | None) -> Held | None:
    """The dataset whose held-out pairs are asked."""
    if dataset is None:
        return None
    place = Path(dataset)
    manifest = read_manifest(place)
    wanted = recorded["reference"] if recorded is not None else None
    if wanted is None and len(list_references(place)) != 1:
        return Held(place, manifest, None, None)
    key, found = pick_reference(place, wanted)
    return Held(place, manifest, key, found)


def _template_of(held: Held | None) -> str | None:
    """The chat template that the dataset's reference was scored with."""
    if held is None or held.key is None:
        return None
    path = held.folder / REFERENCES / held.key / TEMPLATE_FILE
    return str(path) if path.exists() else None


def _reference_of(
    held: Held | None, recorded: dict[str, Any] | None, usual: str | Path | None, kind: Kind, template: str | None
) -> tuple[Model | None, str | None]:
    """The dataset's precompute.model, or what the run began with: the first that is the reference still.

    A folder may hold another model by now, and a gain over that would pass for one over the reference. Where nothing
    says what the reference was, the first that is there.

    Returns:
        it, or why there is none.
    """
    names = [usual, held.manifest["pipeline"].get("precompute", {}).get("model") if held is not None else None]
    names += [recorded["model"]] if recorded is not None else []
    named = list(dict.fromkeys(str(name) for name in names if name))
    there = [name for name in named if Path(name).is_dir()]
    for name in there:
        found = _identified(name, kind, template)
        if _is_still(found.identity, held, recorded):
            return found, None
    if not named:
        return None, None
    if not there:
        return None, f"the reference {named[0]} is not there from this directory: --reference says where"
    return None, f"{there[0]} is another model than the one that the reference was scored with: --reference says which"


def _is_still(identity: Mapping[str, Any], held: Held | None, recorded: dict[str, Any] | None) -> bool:
    """Whether a model is the one that the dataset's reference was scored with, or else that the run began with."""
    if held is not None and held.recorded is not None:
        return all(held.recorded["identity"][field] == identity[field] for field in ("weights_sha256", "config"))
    began = None if recorded is None else recorded.get("policy_sha256")
    mine = {field: identity[field] for field in ("weights_sha256", "config", "tokenizer_sha256")}
    return began in (None, identity_sha256(mine))


def _run_around(model: Path) -> Path | None:
    """The run whose final model a folder is."""
    found = model.resolve().parent
    return found if model.resolve().name == MODEL and is_run(found) else None


def why_not_held_out(plan: Plan) -> str | None:
    """Why held-out pairs cannot be scored; None where they can."""
    if plan.held is None:
        return "no dataset: --dataset"
    if plan.held.recorded is None:
        return "the dataset has no reference, or several and the run does not say which"
    mine = plan.models[POLICY].identity["tokenizer_sha256"]
    same = plan.held.recorded["identity"]["tokenizer_sha256"] == mine
    return None if same else "its reference has another tokenizer"


def train_settings(run: Mapping[str, Any] | None, held: Held) -> TrainConfig:
    """What margins are computed with: the run's settings, else those of the dataset's pipeline."""
    return TrainConfig.model_validate(run["train"] if run is not None else held.manifest["pipeline"].get("train", {}))


def _objective(run: Mapping[str, Any] | None, held: Held) -> dict[str, Any]:
    """What decides the margins of held-out pairs beside the models."""
    settings = train_settings(run, held)
    steps = None if run is None else run.get("steps")
    beta = beta_at(steps, steps, settings) if steps else settings.beta
    told = settings.model_dump(mode="json", include={"loss", "label_smoothing", "dpop_lambda", "sft_weight"})
    return told | {"beta": beta}


def _identified(folder: str, kind: Kind, template: str | None) -> Model:
    tokenizer = load_tokenizer(folder)
    identity = policy_identity(Path(folder), tokenizer)
    return Model(
        folder, identity | {"chat_template_sha256": template_sha256(resolve_template(kind, template, tokenizer))}
    )


def prompts_identity(prompts: PromptsConfig) -> dict[str, Any]:
    """What a section of prompts asks: the hashes of its files, and how they are read."""
    if is_dataset(prompts):  # its manifest holds more than pairs decide
        hashes = [part["sha256"] for part in read_manifest(Path(prompts.path))["parts"]["pairs"]]
    else:
        hashes = [file_sha256(Path(file)) for file in expand(prompts.path)]
    return {"sha256": hashes, "columns": dict(prompts.columns), "limit": prompts.limit, "split": prompts.split}


def _unseen(prompts: PromptsConfig) -> PromptsConfig:
    """Of a dataset its test split, unless another is said: a policy is measured on what it was not trained on.

    Raises:
        SourceError: a split of what is no dataset.
    """
    refuse_split(prompts)
    if not is_dataset(prompts) or prompts.split is not None:
        return prompts
    return prompts.model_copy(update={"split": "test"})


def _identity(
    settings: EvaluateConfig,
    models: Mapping[str, Model],
    held: Held | None,
    run: Mapping[str, Any] | None,
    scorers: Mapping[str, Any],
) -> dict[str, Any]:
    told = settings.model_dump(mode="json", exclude={"prompts", "texts", "reference", "against", "scorers"})
    against = settings.against if settings.against in ("reference", "chosen") else OTHER
    dataset = None
    if held is not None:
        parts = held.manifest["parts"]["pairs"]
        dataset = {"reference": held.key, "parts": parts, "objective": _objective(run, held)}
    return {
        "models": {role: identity_sha256(model.identity) for role, model in models.items()},
        "prompts": prompts_identity(settings.prompts),
        "texts": None if settings.texts is None else prompts_identity(settings.texts),
        "scorers": dict(scorers),
        "settings": told | {"against": against},
        "dataset": dataset,
    }


def sampling(plan: Plan, role: str, temperature: float) -> SampleConfig:
    """How a model is sampled, and into which folder: a name of all that decides its responses."""
    settings = plan.settings
    greedy = temperature == 0
    told: dict[str, Any] = {
        "n": 1 if greedy else settings.n,
        "temperature": temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "max_new_tokens": settings.max_new_tokens,
        "stop": list(settings.stop),
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    model = plan.models[role]
    key = reference_key(
        {"model": model.identity, "prompts": prompts_identity(settings.prompts), "kind": plan.kind, **told}
    )
    prompts = settings.prompts.model_dump(mode="json", exclude_unset=True)
    return SampleConfig(prompts=PromptsConfig(**prompts), out=str(plan.samples / key), model=model.folder, **told)
