"""The DuckDB views over a dataset: their names, and the SQL that makes each from the files that are there.

Every view is always there; where a table has no file yet, it is an empty view with the table's columns. `learning` has
no files: it is pair_dynamics, a row a run and pair.
"""

from collections.abc import Collection, Mapping, Sequence

import polars as pl

from prefkit.format import Kind, schema

# view -> its table in format.TABLES, the glob of its files, and the column that names the directory a file lies in
VIEW_FILES: Mapping[str, tuple[str, str, str | None]] = {
    "pairs": ("pairs", "pairs/part-*.parquet", None),
    "dropped": ("dropped", "dropped/part-*.parquet", None),
    "rejects": ("rejects", "rejects/part-*.parquet", None),
    "changes": ("changes", "changes/part-*.parquet", None),
    "tokens": ("tokens", "audit/tokens.parquet", None),
    "structure": ("structure", "audit/structure.parquet", None),
    "probe": ("probe", "audit/probe.parquet", None),
    "pair_scores": ("pair_scores", "audit/pair_scores.parquet", None),
    "reference": ("reference", "reference/*/part-*.parquet", "key"),
    "steps": ("steps", "runs/*/steps.parquet", "run"),
    "perf": ("perf", "runs/*/perf.parquet", "run"),
    "pair_dynamics": ("pair_dynamics", "runs/*/pair_dynamics/part-*.parquet", "run"),
}
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
VIEW_NAMES = (*VIEW_FILES, *DERIVED_VIEWS)
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
    table, _, directory = VIEW_FILES[view]
    columns = schema(table, kind)
    names = ", ".join(f'"{name}"' for name in columns)
    if not files:
        typed = [f'CAST(NULL AS {sql_type(dtype)}) AS "{name}"' for name, dtype in columns.items()]
        key = [f"CAST(NULL AS VARCHAR) AS {directory}"] if directory else []
        return f"CREATE OR REPLACE VIEW {view} AS SELECT {', '.join(key + typed)} WHERE false;"
    listed = "[" + ", ".join(quoted(file) for file in files) + "]"
    if directory is None:
        return f"CREATE OR REPLACE VIEW {view} AS SELECT {names} FROM read_parquet({listed});"
    # the directory is the path's component right below reference/ or runs/
    root = VIEW_FILES[view][1].partition("/")[0]
    below = VIEW_FILES[view][1].split("/*/", 1)[1].replace(".", "[.]").replace("*", "[^/]*")
    key_sql = f"regexp_extract(filename, '(?:^|/){root}/([^/]+)/{below}$', 1) AS {directory}"
    read = f"read_parquet({listed}, filename=true, union_by_name=true)"
    # runs of earlier releases lack columns: an empty row of all of them, united by name, gives nulls there
    empty = ", ".join(f'CAST(NULL AS {sql_type(dtype)}) AS "{name}"' for name, dtype in columns.items())
    rows = f"(SELECT {empty}, NULL::VARCHAR AS filename WHERE false UNION ALL BY NAME SELECT * FROM {read})"
    return f"CREATE OR REPLACE VIEW {view} AS SELECT {key_sql}, {names} FROM {rows};"


def views_sql(kind: Kind, present: Collection[str]) -> str:
    """`views.sql`: every view with relative paths, to run with the dataset as working directory.

    Those not `present` (no file yet) are empty; the file is written anew by every command that adds a table.
    """
    lines = ["-- views over this dataset: run DuckDB with this directory as its working directory"]
    lines += [view_sql(view, kind, [VIEW_FILES[view][1]] if view in present else []) for view in VIEW_FILES]
    lines += [view_sql(view, kind) for view in DERIVED_VIEWS]
    return "\n".join(lines) + "\n"
