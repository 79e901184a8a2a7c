"""What can be asked: views over the tables, live and archived rows alike. Times are UTC, shares are of 1."""

from __future__ import annotations

from typing import NamedTuple


class View(NamedTuple):
    """One view: what it answers, its columns with their meaning, and its query."""

    name: str
    meaning: str
    columns: tuple[tuple[str, str], ...]
    query: str


_TOKENS = (
    ("prompt_tokens", "tokens of the prompts"),
    ("cached_tokens", "of those, found cached by the engines"),
    ("hit_rate", "share of the prompt tokens that was cached"),
)
_RATE = "sum(cached_tokens)::DOUBLE / nullif(sum(prompt_tokens), 0)"
_SUMS = (
    "count(*) AS requests, sum(prompt_tokens)::UBIGINT AS prompt_tokens, sum(cached_tokens)::UBIGINT AS cached_tokens, "
    f"{_RATE} AS hit_rate"
)

VIEWS = (
    View(
        "nodes", "every node that ever registered, as it is now",
        (
            ("node", "the node"),
            ("state", "up, cordoned, lost or removed"),
            ("since", "when that began"),
            ("registered", "when its cache's present life began"),
            ("epoch", "sequence of that registration"),
            ("models", "the cache's model, then other names that it answers to"),
            ("block_size", "tokens a block"),
            ("capacity_blocks", "blocks that the tier gpu can hold"),
            ("cache_mode", "managed or reported"),
            ("engine", "what runs there"),
        ),
        """
        WITH registered AS (
          SELECT node, arg_max((time, sequence, models, block_size, capacity_gpu, cache_mode, engine), sequence) AS r
          FROM node_changes WHERE change = 'registered' GROUP BY node
        ), changed AS (
          SELECT node,
            max(sequence) FILTER (change = 'registered') AS born,
            max(sequence) FILTER (change = 'removed') AS gone,
            max(sequence) FILTER (change = 'lost') AS lost,
            max(sequence) FILTER (change IN ('recovered', 'registered')) AS back,
            max(sequence) FILTER (change = 'cordoned') AS cordoned,
            max(sequence) FILTER (change IN ('uncordoned', 'removed')) AS uncordoned,
            max(time) AS since
          FROM node_changes GROUP BY node
        )
        SELECT node,
          CASE WHEN gone > born THEN 'removed' WHEN lost > back THEN 'lost'
            WHEN cordoned > coalesce(uncordoned, 0) THEN 'cordoned' ELSE 'up' END AS state,
          since, r[1] AS registered, r[2] AS epoch, r[3] AS models, r[4] AS block_size, r[5] AS capacity_blocks,
          r[6] AS cache_mode, r[7] AS engine
        FROM registered JOIN changed USING (node)
        """,
    ),
    View(
        "node_timeline", "what happened to each node, and how long it lasted",
        (
            ("node", "the node"),
            ("time", "when"),
            ("change", "registered, cordoned, uncordoned, lost, recovered or removed"),
            ("reason", "why"),
            ("seconds", "until the node's next change; null for the last one"),
            ("sequence", "sequence of the commit"),
        ),
        """
        SELECT node, time, change, reason,
          date_diff('microsecond', time, lead(time) OVER (PARTITION BY node ORDER BY sequence)) / 1e6 AS seconds,
          sequence
        FROM node_changes
        """,
    ),
    View(
        "hit_rate_by_hour", "how much of the prompts was cached, by hour and model",
        (("hour", "beginning of the hour"), ("model", "the model"), ("requests", "requests that completed"), *_TOKENS),
        f"SELECT date_trunc('hour', time) AS hour, model, {_SUMS} FROM completions WHERE status = 'ok' GROUP BY ALL",
    ),
    View(
        "hit_rate_by_node", "how much of the prompts was cached, by node",
        (("node", "the node"), ("requests", "requests that completed there"), *_TOKENS),
        f"SELECT node, {_SUMS} FROM completions WHERE status = 'ok' GROUP BY ALL",
    ),
    View(
        "hot_prefixes", "beginnings of prompts that came again and again",
        (
            ("model", "the model"),
            ("prefix", "block that ends the first 512 tokens of the prompts, or a shorter prompt's last"),
            ("requests", "requests that began so"),
            ("tokens", "tokens of those prompts"),
            ("matched", "share of their blocks that the routers expected to be cached"),
            ("nodes", "on how many nodes they were sent"),
            ("last", "when the last one was routed"),
        ),
        """
        SELECT model, prefix, sum(requests)::UBIGINT AS requests, sum(tokens)::UBIGINT AS tokens,
          sum(matches)::DOUBLE / nullif(sum(blocks), 0) AS matched, count(*) AS nodes, max(last) AS last
        FROM (
          SELECT model, prefix, node, count(*) AS requests, sum(tokens) AS tokens, sum("match") AS matches,
            sum(blocks) AS blocks, max(time) AS last
          FROM decisions WHERE prefix IS NOT NULL GROUP BY model, prefix, node
        )
        GROUP BY model, prefix HAVING sum(requests) > 1
        """,
    ),
    View(
        "match_predicted_vs_delivered", "what routers expected to be cached, beside what engines found, by hour and node",
        (
            ("hour", "beginning of the hour"),
            ("node", "the node"),
            ("requests", "requests that completed and whose decision and usage are known"),
            ("predicted_tokens", "tokens that the routers expected to be cached"),
            ("cached_tokens", "tokens that the engines found"),
            ("over", "tokens that were expected and not found, summed over requests"),
            ("under", "tokens that were found and not expected, summed over requests"),
            ("right", "share of the requests for which both are equal"),
        ),
        """
        SELECT date_trunc('hour', time) AS hour, node, count(*) AS requests,
          sum(predicted_tokens)::UBIGINT AS predicted_tokens, sum(cached_tokens)::UBIGINT AS cached_tokens,
          sum(CASE WHEN predicted_tokens > cached_tokens THEN predicted_tokens - cached_tokens ELSE 0 END)::UBIGINT AS over,
          sum(CASE WHEN cached_tokens > predicted_tokens THEN cached_tokens - predicted_tokens ELSE 0 END)::UBIGINT AS under,
          avg((predicted_tokens = cached_tokens)::INTEGER) AS "right"
        FROM completions WHERE status = 'ok' AND routed IS NOT NULL AND prompt_tokens > 0 GROUP BY ALL
        """,
    ),
    View(
        "evictions_by_node", "what nodes stored and evicted, by hour",
        (
            ("hour", "beginning of the hour"),
            ("node", "the node"),
            ("stored", "blocks that were stored"),
            ("evicted", "blocks that left to make space"),
            ("cleared", "how often the whole cache was taken as empty"),
        ),
        """
        SELECT date_trunc('hour', time) AS hour, node,
          coalesce(sum(blocks) FILTER (change IN ('stored', 'placed')), 0)::UBIGINT AS stored,
          sum(evicted_blocks)::UBIGINT AS evicted, count(*) FILTER (change = 'cleared') AS cleared
        FROM cache_changes GROUP BY ALL
        """,
    ),
    View(
        "session_moves", "sessions that went to another node",
        (
            ("time", "when"),
            ("model", "the model"),
            ("session", "the session"),
            ("from_node", "where it was"),
            ("to_node", "where it is from then on"),
            ("sequence", "sequence of the commit"),
        ),
        """
        SELECT time, model, session, substr(reason, 6) AS from_node, node AS to_node, sequence
        FROM session_changes WHERE change = 'moved'
        """,
    ),
    View(
        "ttft_by_policy", "time to first token in seconds, by policy and model",
        (
            ("policy", "policy that decided"),
            ("model", "the model"),
            ("requests", "requests that completed and whose decision is known"),
            ("mean", "mean"),
            ("p50", "half of the requests took no longer (estimated to a percent or so)"),
            ("p90", "90 of 100 took no longer (the same)"),
            ("p99", "99 of 100 took no longer (the same)"),
            ("hit_rate", "share of the prompt tokens that was cached"),
        ),
        f"""
        SELECT policy, model, count(*) AS requests, avg(ttft) AS mean,
          approx_quantile(ttft, 0.5) AS p50, approx_quantile(ttft, 0.9) AS p90, approx_quantile(ttft, 0.99) AS p99,
          {_RATE} AS hit_rate
        FROM completions WHERE status = 'ok' AND routed IS NOT NULL GROUP BY ALL
        """,
    ),
    View(
        "regret", "how often a longer match was to be had than that of the chosen node, by policy",
        (
            ("policy", "policy that decided"),
            ("model", "the model"),
            ("requests", "decisions for which both are known"),
            ("passed_over", "decisions for which another node had a longer match"),
            ("match", "mean match of the chosen node, in blocks"),
            ("best_match", "mean of the longest match, in blocks"),
            ("tokens", "cached tokens that were passed over, summed"),
        ),
        """
        SELECT policy, model, count(*) AS requests, count(*) FILTER (best_match > "match") AS passed_over,
          avg("match") AS "match", avg(best_match) AS best_match,
          sum((best_match - "match")::UBIGINT * coalesce(block_size, 0))::UBIGINT AS tokens
        FROM decisions WHERE best_match IS NOT NULL GROUP BY ALL
        """,
    ),
    View(
        "skipped_commits", "commits that change nothing, by reason",
        (
            ("reason", "why, in a word"),
            ("commits", "how many"),
            ("first_time", "the first one's time"),
            ("last_time", "the last one's time"),
            ("last_sequence", "the last one's sequence"),
            ("names", "nodes, models or writers that their subjects name, a few of them"),
            ("writers", "who wrote them by their headers, a few of them"),
        ),
        """
        SELECT skipped AS reason, count(*) AS commits, min(time) AS first_time, max(time) AS last_time,
          max(sequence) AS last_sequence, list_sort(list(DISTINCT name))[:5] AS names,
          coalesce(list_sort(list(DISTINCT writer) FILTER (writer IS NOT NULL))[:5], []) AS writers
        FROM (SELECT * EXCLUDE (writer), try(headers->>'Kv-Writer') AS writer FROM commits WHERE skipped IS NOT NULL)
        GROUP BY skipped
        """,
    ),
)  # fmt: skip
