"""The DuckDB views over a dataset: their names, and the SQL that makes each from the files that are there.

Every view is always there; where a table has no file yet, it is an empty view with the table's columns. `learning` has
no files: it is pair_dynamics, a row a run and pair. Views and columns carry the format's own words as comments.
"""

from collections.abc import Mapping, Sequence

import polars as pl

from prefkit.format import RUNS, SWEEPS, TABLES, Kind, schema

# view -> its table in format.TABLES, the glob of its files, and the columns that name the directories a file lies in,
# one for each * between slashes
VIEW_FILES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "pairs": ("pairs", "pairs/part-*.parquet", ()),
    "dropped": ("dropped", "dropped/part-*.parquet", ()),
    "rejects": ("rejects", "rejects/part-*.parquet", ()),
    "changes": ("changes", "changes/part-*.parquet", ()),
    "tokens": ("tokens", "audit/tokens.parquet", ()),
    "structure": ("structure", "audit/structure.parquet", ()),
    "probe": ("probe", "audit/probe.parquet", ()),
    "pair_scores": ("pair_scores", "audit/pair_scores.parquet", ()),
    "reference": ("reference", "reference/*/part-*.parquet", ("key",)),
    "reference_dropped": ("reference_dropped", "reference/*/dropped.parquet", ("key",)),
    "steps": ("steps", "runs/*/steps.parquet", ("run",)),
    "perf": ("perf", "runs/*/perf.parquet", ("run",)),
    "pair_dynamics": ("pair_dynamics", "runs/*/pair_dynamics/part-*.parquet", ("run",)),
    "evaluations": ("evaluations", "runs/*/evaluations/*/summary.parquet", ("run", "evaluation")),
    "evaluation_prompts": ("evaluation_prompts", "runs/*/evaluations/*/prompts.parquet", ("run", "evaluation")),
    "sweeps": ("sweeps", "sweeps/*/table.parquet", ("sweep",)),
}
MANIFEST_VIEWS = ("pairs", "dropped", "rejects", "changes")  # whose parts the manifest lists
AUDIT_VIEWS = ("tokens", "structure", "probe", "pair_scores")  # whose parts audit.json lists
REFERENCE_VIEWS = ("reference", "reference_dropped")  # whose parts each reference.json lists
# what a query does not ask for is not computed: the lists least of all
DERIVED_VIEWS: Mapping[str, str] = {
    "learning": """
WITH pairs_seen AS (
    SELECT run, pair_id, count(*) AS num_seen, count_if(margin > 0) AS num_right, avg(margin) AS mean_margin,
        list_sort(list({'step': step, 'margin': margin})) AS seen
    FROM pair_dynamics WHERE step > 0 GROUP BY run, pair_id
), histories AS (
    SELECT *, list_aggregate([CAST(one.margin > 0 AS INTEGER) FOR one IN seen], 'string_agg', '') AS history
    FROM pairs_seen
)
SELECT run, pair_id, num_seen, CAST(num_right AS BIGINT) AS num_right,
    (2 * length(history) - length(replace(history, '01', '')) - length(replace(history, '10', ''))) // 2 AS num_flips,
    (length(history) - length(replace(history, '10', ''))) // 2 AS num_forgotten, history, seen[1].step AS first_step,
    seen[length(rtrim(history, '1')) + 1].step AS learned_step, seen[1].margin AS first_margin,
    (seen[1].margin + seen[least(2, num_seen)].margin) / 2 AS early_margin, seen[-1].margin AS last_margin, mean_margin
FROM histories""",
}
SOURCES_OF: Mapping[str, tuple[str, ...]] = {"learning": ("pair_dynamics",)}
VIEW_NAMES = (*VIEW_FILES, *DERIVED_VIEWS)
VIEW_DOCS: Mapping[str, str] = {
    "pairs": "the pairs that are fit to train on",
    "dropped": "records and pairs that a named rule removed",
    "rejects": "lines that could not become a record, raw",
    "changes": "of a repaired dataset: what was done to which pair, and why",
    "tokens": "words and n-grams: how often in chosen only, in rejected only, in both",
    "structure": "length, markup, openers, endings, generators: which side has more",
    "probe": "how far shallow features alone predict chosen",
    "pair_scores": "by pair: how much shallow features give away",
    "reference": "by pair: the reference model's log-probs, and the tokens that were scored",
    "reference_dropped": "pairs that encoding left out of a reference, and why",
    "steps": "by update of a run: loss, rewards, drift, evaluations",
    "perf": "by update of a run: what it cost",
    "pair_dynamics": "each pair's reward margin each time a run saw it",
    "learning": "by run and pair: when it was learned, forgotten, or never learned",
    "sweeps": "by combination of a sweep's settings: its run, its losses, and what fresh samples of it measured",
    "evaluations": "by run, evaluation and metric: what fresh responses were worth, with intervals",
    "evaluation_prompts": "by run, evaluation and prompt: rewards, wins, KL and lengths of both models",
}
DIRECTORY_DOCS: Mapping[str, str] = {
    "key": "of the reference: its directory's name",
    "run": "the directory's name",
    "sweep": "the directory's name",
    "evaluation": "of the run: its directory's name",
}
SQL_TYPES: Mapping[type[pl.DataType], str] = {
    pl.String: "VARCHAR",
    pl.Int64: "BIGINT",
    pl.Int32: "INTEGER",
    pl.Float64: "DOUBLE",
    pl.Float32: "FLOAT",
    pl.Boolean: "BOOLEAN",
}


def quoted(text: str) -> str:
    """A SQL string literal: text is data, never SQL."""
    return "'" + text.replace("'", "''") + "'"


def sql_type(dtype: pl.DataType) -> str:
    """The DuckDB type of a Polars dtype of the format."""
    if isinstance(dtype, pl.List):
        return sql_type(dtype.inner) + "[]"  # type: ignore[arg-type]
    if isinstance(dtype, pl.Struct):
        fields = ", ".join(f'"{field.name}" {sql_type(field.dtype)}' for field in dtype.fields)  # type: ignore[arg-type]
        return f"STRUCT({fields})"
    return SQL_TYPES[dtype.base_type()]  # a field may hold a dtype's class or an instance of it


def view_sql(view: str, kind: Kind, files: Sequence[str] = ()) -> str:
    """The statement that makes one view over the given files; a derived view has none."""
    if view in DERIVED_VIEWS:
        return f"CREATE OR REPLACE VIEW {view} AS {DERIVED_VIEWS[view].strip()};"
    table, pattern, directories = VIEW_FILES[view]
    columns = schema(table, kind)
    names = ", ".join(f'"{name}"' for name in columns)
    if not files:
        typed = [f'CAST(NULL AS {sql_type(dtype)}) AS "{name}"' for name, dtype in columns.items()]
        key = [f"CAST(NULL AS VARCHAR) AS {directory}" for directory in directories]
        return f"CREATE OR REPLACE VIEW {view} AS SELECT {', '.join(key + typed)} WHERE false;"
    listed = "[" + ", ".join(quoted(file) for file in files) + "]"
    if not directories:
        return f"CREATE OR REPLACE VIEW {view} AS SELECT {names} FROM read_parquet({listed});"
    # the directories are the components of the path that stand for a * of the pattern
    root, *below = pattern.split("/*/")
    last = below[-1].replace(".", "[.]").replace("*", "[^/]*")
    path = "(?:^|/)" + "/([^/]+)/".join([root, *below[:-1], last]) + "$"
    keys = ", ".join(
        f"regexp_extract(filename, '{path}', {number}) AS {name}" for number, name in enumerate(directories, 1)
    )
    read = f"read_parquet({listed}, filename=true, union_by_name=true)"
    # runs of earlier releases lack columns: an empty row of all of them, united by name, gives nulls there
    empty = ", ".join(f'CAST(NULL AS {sql_type(dtype)}) AS "{name}"' for name, dtype in columns.items())
    rows = f"(SELECT {empty}, NULL::VARCHAR AS filename WHERE false UNION ALL BY NAME SELECT * FROM {read})"
    return f"CREATE OR REPLACE VIEW {view} AS SELECT {keys}, {names} FROM {rows};"


def comments_sql(view: str) -> list[str]:
    """What a client shows beside a view and its columns: the format's own words."""
    table = VIEW_FILES[view][0] if view in VIEW_FILES else view
    directories = VIEW_FILES[view][2] if view in VIEW_FILES else ("run",)
    docs = {directory: DIRECTORY_DOCS[directory] for directory in directories}
    docs |= {column.name: column.doc for column in TABLES[table]}
    return [
        f"COMMENT ON VIEW {view} IS {quoted(VIEW_DOCS[view])};",
        *(f'COMMENT ON COLUMN {view}."{name}" IS {quoted(doc)};' for name, doc in docs.items()),
    ]


def views_sql(kind: Kind, files: Mapping[str, Sequence[str]]) -> str:
    """`views.sql`: every view with relative paths, to run with the dataset as working directory.

    Args:
        kind: of the dataset.
        files: view -> its files below the dataset; without any a view is empty. They are named one by one, so that a
            part that is gone is an error and not fewer rows; those of runs by a pattern, as runs come and go.
    """
    lines = [
        "-- Views over this dataset, for DuckDB 1.0 or newer: run it with this directory as the working directory,",
        "-- as in: duckdb -init views.sql",
    ]
    for view in VIEW_FILES:
        listed = files.get(view, [])
        lines.append(view_sql(view, kind, [VIEW_FILES[view][1]] if of_runs(view) and listed else listed))
    lines += [view_sql(view, kind) for view in DERIVED_VIEWS]
    lines += [line for view in VIEW_NAMES for line in comments_sql(view)]
    return "\n".join(lines) + "\n"


def of_runs(view: str) -> bool:
    """Whether a view's files lie below runs/ or sweeps/: nothing lists them."""
    return VIEW_FILES[view][1].startswith((f"{RUNS}/", f"{SWEEPS}/"))
