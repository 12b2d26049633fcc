"""What a run is, in plain words: lines for a terminal and for a page. Pure."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from prefkit.curves import Curves, Ends, progress
from prefkit.train_settings import TrainConfig

SAVED = {
    "model": "the whole model",
    "adapter": "an adapter: the model it started from is needed beside it",
    "merged": "the whole model, its adapter folded in",
}
EVALUATED = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
# of run.json, what made the run what it is, beside its train section
OTHER_SETTINGS = (
    "dataset",
    "pairs",
    "data_sha256",
    "model",
    "policy_sha256",
    "reference",
    "num_processes",
    "micro_batch_tokens",
    "layout",
    "prefkit_version",
)
ABSENT = object()


class Fact(NamedTuple):
    """One line: a short name, and what there is to say."""

    name: str
    text: str


class Setting(NamedTuple):
    """One setting of one or several runs: a value a run, as text, and whether it is worth a second look.

    `differs`: between the runs; of a single run: from the default.
    """

    name: str
    values: list[str]
    differs: bool


def run_names(paths: Sequence[str]) -> list[str]:
    """The shortest names that tell runs apart: their paths without the folders all of them begin with.

    Example: d/runs/1 and d/runs/2 give 1 and 2; a single run keeps its path.
    """
    parts = [PurePath(path).parts for path in paths]
    if len(parts) < 2:
        return [str(PurePath(path)) for path in paths]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return [str(PurePath(*one[shared:])) for one in parts]


def state_of(run: Curves) -> str:
    """Whether it is finished, and how far it is."""
    made, total = progress(run)
    if run.document.get("stopped_early"):
        of = f" of {total:,}" if total is not None and total != made else ""
        metric = run.document["train"].get("best_metric") or "best_metric"
        return f"stopped early after {made:,}{of} updates: no better {metric}"
    if run.document["finished"]:
        return f"finished: {made:,} updates"
    return f"unfinished: {made:,} of {total:,} updates" if total is not None else f"unfinished: {made:,} updates so far"


def facts_of(run: Curves) -> list[Fact]:
    """What there is to say of a run; nothing of what an older prefkit did not record."""
    document, train = run.document, run.document["train"]
    facts = [
        Fact("state", state_of(run)),
        Fact("model", document["model"]),
        Fact("reference", f"{document['reference']} of {document['dataset']} ({document['pairs']:,} pairs)"),
        Fact("loss", _loss(train)),
        Fact("optimiser", _optimiser(train)),
    ]
    if lora := train.get("lora"):
        facts.append(Fact("adapter", ", ".join(f"{name} {_as_text(value)}" for name, value in lora.items())))
    if document.get("num_processes") is not None:
        shards = ", each keeps a share of the weights" if train.get("shard_weights") else ""
        facts.append(Fact("processes", f"{document['num_processes']}{shards}"))
    if document.get("layout"):
        facts.append(Fact("layout", document["layout"]))
    if document["gate"]:
        facts.append(Fact("gate", _gate(document["gate"])))
    if document.get("saved"):
        facts.append(Fact("model/ holds", SAVED[document["saved"]]))
    if best := document.get("best"):
        facts.append(Fact("best", f"{best['metric']} {_number(best['value'])} at step {best['step']:,}"))
    if evaluated := document.get("eval"):
        named = [f"{name} {_number(evaluated[key])}" for name, key in EVALUATED.items() if key in evaluated]
        of = f" of step {best['step']:,}" if best else ""
        facts.append(Fact(f"test split{of}", ", ".join(named)))
    changes = document.get("changes", [])
    return facts + [Fact("changed", f"at step {one['step']:,}: {'; '.join(one['settings'])}") for one in changes]


def figures_of(found: Ends, unit: float, *, digits: int) -> list[str]:
    """First, last, smallest and largest, as short as they can be said.

    What is less than a millionth of the curve's largest value is 0: rounding, in most of them.

    Args:
        found: of a curve.
        unit: what its values are divided by.
        digits: of a value below 1000; above, all before the point.
    """
    least = max(abs(found.min), abs(found.max)) / 1e6

    def short(value: float) -> str:
        if abs(value) < least or not value:
            return "0"
        value /= unit
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"

    return [short(value) for value in found]


def warnings_of(run: Curves) -> list[str]:
    """What training told about the data, a line a warning."""
    return [
        f"step {told['step']:,}: {told['text']}" if told.get("step") is not None else str(told.get("text", ""))
        for told in run.document.get("warnings", [])
    ]


def settings_of(runs: Sequence[Curves]) -> list[Setting]:
    """All settings of the runs, those that are worth a second look first.

    A setting that an older run does not have is `-`: it was not there to be set.
    """
    flats = [_flat(run.document) for run in runs]
    names = list(dict.fromkeys(name for flat in flats for name in flat))
    found = []
    for name in names:
        values = [flat.get(name, ABSENT) for flat in flats]
        differs = any(value != values[0] for value in values) if len(runs) > 1 else _is_set(name, values[0])
        found.append(Setting(name, ["-" if value is ABSENT else _as_text(value) for value in values], differs))
    return sorted(found, key=lambda setting: not setting.differs)


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, as a pipeline and --set name them."""
    flat: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                put(f"{name}.{key}", inner)
        else:
            flat[name] = value

    put("train", document["train"])
    return {name: document[name] for name in OTHER_SETTINGS if document.get(name) is not None} | flat


def _is_set(name: str, value: Any) -> bool:
    """Whether a setting of the train section is not its default."""
    section, _, key = name.partition(".")
    if section != "train":
        return False
    known = TrainConfig.model_fields.get(key)
    return known is None or bool(value != known.get_default(call_default_factory=True))


def _loss(train: Mapping[str, Any]) -> str:
    told = [str(train["loss"]), f"beta {train['beta']:g}"]
    if train.get("beta_end") is not None:
        told[-1] += f" to {train['beta_end']:g} ({train['beta_schedule']})"
    told += [f"{name} {train[name]:g}" for name in ("label_smoothing", "sft_weight") if train.get(name)]
    if train["loss"] == "dpop":
        told.append(f"dpop_lambda {train['dpop_lambda']:g}")
    return ", ".join(told)


def _optimiser(train: Mapping[str, Any]) -> str:
    size, accumulation = train["batch_size"], train.get("gradient_accumulation_steps", 1)
    warm = f" after {train['warmup_steps']} of warm-up" if train.get("warmup_steps") else ""
    batch = f"{size * accumulation} pairs an update" + (f" ({size} x {accumulation})" if accumulation > 1 else "")
    return f"{train['optimizer']}, rate {train['learning_rate']:g} {train['lr_scheduler_type']}{warm}, {batch}"


def _gate(figures: Mapping[str, float]) -> str:
    if not {"rows", "tokens", "max_abs", "rms", "mean"} <= set(figures):
        return ", ".join(f"{name} {_number(value)}" for name, value in figures.items())
    return (
        f"{figures['rows']:,g} pairs, {figures['tokens']:,g} tokens scored again: off by {figures['max_abs']:.2g} nats "
        f"a token at most, {figures['rms']:.2g} rms, {figures['mean']:.2g} on average"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_as_text(inner) for inner in value) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
