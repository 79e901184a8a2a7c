"""What may be asked: one statement that only reads the tables and views of the history.

The judge is DuckDB's own parser. `json_serialize_sql` gives the tree of a statement and refuses all that is no SELECT; every
table, function and form in the tree must then be one that is known to be harmless. What isn't known is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvplane.services.protocol.errors import BadSql

if TYPE_CHECKING:
    from collections.abc import Mapping

    from duckdb import DuckDBPyConnection

LONGEST = 32_768  # characters of a statement
DEEPEST = 100  # brackets in brackets: DuckDB's parser and binder can't be interrupted
MOST_RELATIONS = 50  # tables, once every WITH part is written out where it is named: planning 100 takes seconds
MOST_LAMBDAS = 6  # lambdas in lambdas: each level doubles DuckDB's work

TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "repeat", "json_each", "json_tree"})
SYSTEM_VIEWS = frozenset(
    ("information_schema", view) for view in ("tables", "columns", "schemata", "character_sets", "table_constraints")
)
SHOWN = frozenset({'"tables"', '"schemas"', "__show_tables_expanded"})
HARMLESS_VOLATILE = frozenset(
    {"random", "uuid", "uuidv4", "uuidv7", "gen_random_uuid", "error", "stats", "current_query"}
)
REFUSED = frozenset(
    {
        *("getenv", "current_setting", "json_serialize_plan", "pg_sleep", "pg_get_viewdef", "pg_get_constraintdef"),
        *("get_block_size", "to_aggregate_state", "combine", "finalize", "variant_bytes_to_variant"),
    },
)
# One call makes gigabytes of a few bytes, beside DuckDB's memory limit and deaf to interruption.
HUGE = frozenset(
    {"repeat", "lpad", "rpad", "list_resize", "array_resize", "range", "generate_series", "printf", "format"},
)

EXPRESSIONS = frozenset(
    {
        *(
            "BETWEEN",
            "CASE",
            "CAST",
            "COLLATE",
            "COLUMN_REF",
            "COMPARISON",
            "CONJUNCTION",
            "CONSTANT",
            "DEFAULT",
            "FUNCTION",
        ),
        *(
            "LAMBDA",
            "LAMBDA_REF",
            "OPERATOR",
            "PARAMETER",
            "POSITIONAL_REFERENCE",
            "STAR",
            "SUBQUERY",
            "TYPE",
            "WINDOW",
        ),
    },
)
FORMS = frozenset(
    {
        *(
            "SELECT_NODE",
            "SET_OPERATION_NODE",
            "RECURSIVE_CTE_NODE",
            "BASE_TABLE",
            "JOIN",
            "SUBQUERY",
            "TABLE_FUNCTION",
        ),
        *(
            "EXPRESSION_LIST",
            "EMPTY",
            "PIVOT",
            "SHOW_REF",
            "ORDER_MODIFIER",
            "LIMIT_MODIFIER",
            "LIMIT_PERCENT_MODIFIER",
        ),
        *("DISTINCT_MODIFIER", "ORDER_DEFAULT", "ASCENDING", "DESCENDING"),
    },
)

NOT_A_FILE = re.compile(r"[\w ]+")
EXPLAIN = re.compile(r"\s*explain\s+(?!analyze\b|\()(.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Functions:
    """Names of functions, in lower case: those nobody may call, and the owner's own that give tables."""

    refused: frozenset[str]
    table_macros: frozenset[str]

    @classmethod
    def read(cls, cursor: DuckDBPyConnection) -> Functions:
        """The functions of this DuckDB. It takes 50 ms, so it is read once."""
        functions = cursor.execute(
            "SELECT DISTINCT lower(function_name), function_type, internal, stability FROM duckdb_functions()",
        ).fetchall()
        volatile = frozenset(name for name, _, builtin, stability in functions if builtin and stability == "VOLATILE")
        return cls(
            (volatile - HARMLESS_VOLATILE) | REFUSED,
            frozenset(name for name, kind, builtin, _ in functions if kind == "table_macro" and not builtin),
        )


@dataclass(frozen=True, slots=True)
class Relations:
    """Tables and views at one moment, in lower case: `known` by every path that names them, and DuckDB's own names."""

    known: frozenset[tuple[str, ...]]
    internal: frozenset[str]

    @classmethod
    def read(cls, cursor: DuckDBPyConnection) -> Relations:
        """The relations as `cursor` sees them in its transaction."""
        known: set[tuple[str, ...]] = set()
        internal: set[str] = set()
        for current, database, schema, name, builtin in cursor.execute(
            "SELECT lower(current_database()), lower(database_name), lower(schema_name), lower(table_name), internal "
            "FROM duckdb_tables() UNION ALL "
            "SELECT lower(current_database()), lower(database_name), lower(schema_name), lower(view_name), internal "
            "FROM duckdb_views()",
        ).fetchall():
            if builtin:
                internal.add(name)
                continue
            known.add((database, schema, name))
            if database == current:
                known.add((schema, name))
                if schema == "main":
                    known |= {(name,), (database, name)}
        return cls(frozenset(known), frozenset(internal))


def check(cursor: DuckDBPyConnection, sql: str, functions: Functions, relations: Relations | None = None) -> set[str]:
    """Raise `BadSql` unless `sql` is one statement that may be asked; the names of what it reads, DuckDB's own included.

    `relations` are those that there are; those of `cursor` if not given.
    """
    if len(sql) > LONGEST:
        raise BadSql(f"the statement has {len(sql)} characters; at most {LONGEST} are taken: shorten it")
    if "\0" in sql or _depth(sql) > DEEPEST:
        raise BadSql(f"the statement nests brackets more than {DEEPEST} deep, or holds a zero byte: write it flatter")
    explained = EXPLAIN.fullmatch(sql)
    parsed = explained[1] if explained else sql
    try:
        tree = json.loads(_one(cursor, "SELECT json_serialize_sql(?::VARCHAR)", parsed))
        if tree["error"]:
            _refuse(cursor, parsed, tree)
        statements = tree["statements"]
        if len(statements) != 1:
            raise BadSql(_COUNT.format(len(statements)))
        walk = _Walk(Relations.read(cursor) if relations is None else relations, functions)
        if walk.weigh(statements[0], {}) > MOST_RELATIONS:
            raise BadSql(f"the statement reads more than {MOST_RELATIONS} tables, WITH parts written out: ask for less")
    except RecursionError:
        raise BadSql("the statement is nested too deep: write it flatter") from None
    return walk.named


_COUNT = "one statement is answered at a time, and there are {}: send a single SELECT"


def _one(cursor: DuckDBPyConnection, sql: str, value: str) -> str:
    rows = cursor.execute(sql, [value]).fetchall()
    return str(rows[0][0])


def _depth(sql: str) -> int:
    deepest = depth = 0
    for character in sql:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(depth - 1, 0)
    return deepest


def _refuse(cursor: DuckDBPyConnection, sql: str, tree: Mapping[str, Any]) -> None:
    """Say why there is no tree."""
    if tree["error_type"] != "not implemented":
        at = tree.get("position")
        where = f" (character {int(at) + 1})" if at and str(at).isdigit() else ""
        raise BadSql(f"not valid SQL: {tree['error_message']}{where}")
    kinds = [statement.type.name for statement in cursor.extract_statements(sql)]
    if "MULTI" in kinds:
        raise BadSql("PIVOT must name its values here: PIVOT ... ON column IN ('a', 'b')")
    if len(kinds) > 1:
        raise BadSql(_COUNT.format(len(kinds)))
    if kinds == ["SELECT"]:
        raise BadSql(f"not valid SQL here: {tree['error_message']}")
    raise BadSql(
        f"only reading is allowed, and this is {', '.join(kinds)}: "
        "send a SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW TABLES, SUMMARIZE or EXPLAIN of a SELECT",
    )


class _Walk:
    """One pass over a statement's tree: refuses what isn't known, and counts the tables it reads."""

    def __init__(self, relations: Relations, functions: Functions) -> None:
        self._relations = relations
        self._functions = functions
        self._lambdas = 0
        self.named: set[str] = set()
        """Tables and views, in lower case, without their schema."""

    def weigh(self, node: Any, parts: dict[str, int]) -> int:  # noqa: ANN401
        """The tables read below `node`; `parts` has the count of each WITH part in sight."""
        if isinstance(node, list):
            total = 0
            for child in node:
                total += self.weigh(child, parts)
            return total
        if not isinstance(node, dict):
            return 0
        total, skipped = 0, set[str]()
        if "class" in node:
            self._expression(node)
        elif isinstance(node.get("type"), str):
            form = node["type"]
            if form not in FORMS:
                raise BadSql(f"{_plain(form)} isn't allowed here: only reading is, send a plain SELECT")
            if form == "BASE_TABLE":
                total = self._table(node["qualified_name"]["path"], parts)
            elif form in {"EXPRESSION_LIST", "EMPTY"}:
                total = 1
            elif form == "SHOW_REF":
                self._shown(node)
            elif form == "TABLE_FUNCTION":
                skipped.add("function")
                total = 1 + self._table_function(node["function"], parts)
            elif form == "RECURSIVE_CTE_NODE":
                parts = {**parts, node["cte_name"].lower(): 1}
        if "cte_map" in node:
            skipped.add("cte_map")
            parts = dict(parts)
            for part in node["cte_map"]["map"]:
                weight = self.weigh(part["value"], parts)
                parts[part["key"].lower()] = max(weight, 1)
                total += weight
        for key, child in node.items():
            if key not in skipped:
                total += self.weigh(child, parts)
        if node.get("class") == "LAMBDA":
            self._lambdas -= 1
        return total

    def _expression(self, node: Mapping[str, Any]) -> None:
        kind = node["class"]
        if kind not in EXPRESSIONS:
            raise BadSql(f"{_plain(kind)} isn't allowed here: only reading is, send a plain SELECT")
        if kind == "LAMBDA":
            self._lambdas += 1
            if self._lambdas > MOST_LAMBDAS:
                raise BadSql(f"lambdas are nested more than {MOST_LAMBDAS} deep: write it flatter")
        name = str(node.get("function_name", "")).lower()
        if name in HUGE:
            hint = "use it in FROM" if name in TABLE_FUNCTIONS else "leave it to the reader of the answer"
            raise BadSql(f"{name}() can make one value larger than the memory limit: {hint}")
        if name in self._functions.refused or name.startswith("__internal"):
            raise BadSql(f"{name}() isn't allowed here: it does more than read the history")

    def _table(self, path: list[str], parts: Mapping[str, int]) -> int:
        lowered = tuple(name.lower() for name in path)
        if lowered in self._relations.known or lowered in SYSTEM_VIEWS:
            self.named.add(lowered[-1])
            return parts.get(lowered[0], 1) if len(lowered) == 1 else 1
        name = ".".join(path)
        if len(lowered) > 1 or lowered[0] in self._relations.internal or not NOT_A_FILE.fullmatch(path[0]):
            raise BadSql(
                f"there is no table or view {name!r}; files and the system's tables can't be read: see SHOW TABLES"
            )
        return parts.get(lowered[0], 1)

    def _table_function(self, function: Mapping[str, Any], parts: dict[str, int]) -> int:
        name = str(function["function_name"]).lower()
        if name not in TABLE_FUNCTIONS and name not in self._functions.table_macros:
            raise BadSql(f"{name}() can't be read from: use the tables and views (SHOW TABLES) or {_LISTED}")
        return sum(self.weigh(child, parts) for key, child in function.items() if key != "function_name")

    def _shown(self, node: Mapping[str, Any]) -> None:
        path = node["qualified_name"]["path"]
        if not path or (len(path) == 1 and path[0] in SHOWN):
            self.named.update(path or SHOWN)
            return
        if tuple(name.lower() for name in path) not in self._relations.known:
            raise BadSql(f"there is no table or view {'.'.join(path)!r} to show: see SHOW TABLES")
        self.named.add(path[-1].lower())


_LISTED = ", ".join(sorted(TABLE_FUNCTIONS))


def _plain(name: str) -> str:
    return name.removesuffix("_NODE").removesuffix("_QUERY").replace("_", " ")
