"""The tutorial's questions, asked of its history; the text about an answer is made of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docs.tutorial.log import LOST
from docs.tutorial.notebook import shown

if TYPE_CHECKING:
    from docs.tutorial.notebook import Notebook


def hit_rate(page: Notebook) -> None:
    """Which node does worst, and why."""
    page.title("Which node has the worst hit rate, and why?", 3)
    rows = page.ask("SELECT node, requests, hit_rate FROM hit_rate_by_node ORDER BY hit_rate")
    worst = rows[0]["node"]
    page.say(
        "What a node computed, it computed for one of three reasons: no node that could have been chosen held the "
        "blocks, another one held them, or the node was expected to hold them and did not. A decision knows the "
        "longest match of all nodes (`best_match`) and that of the chosen one (`match`); a completion knows what was "
        "found."
    )
    why = page.ask("""
        SELECT c.node,
          sum(c.prompt_tokens - c.cached_tokens) AS computed,
          sum(c.prompt_tokens - least(d.best_match * d.block_size, c.prompt_tokens)) / sum(c.prompt_tokens) AS held_by_none,
          sum((d.best_match - d."match") * d.block_size) / sum(c.prompt_tokens) AS held_elsewhere,
          sum(greatest(c.predicted_tokens::BIGINT - c.cached_tokens::BIGINT, 0)) / sum(c.prompt_tokens) AS not_found
        FROM completions c JOIN decisions d ON d.sequence = c.routed AND d.request = c.request
        WHERE c.status = 'ok'
        GROUP BY c.node ORDER BY c.node
    """)
    row = next(row for row in why if row["node"] == worst)
    reasons = {
        "held_by_none": "its requests were mostly new to the fleet: no routing would have helped",
        "held_elsewhere": "other nodes held what it was asked for: the policy sent the requests to the wrong place",
        "not_found": "it did not have what it was expected to have",
    }
    most = max(reasons, key=lambda name: row[name])
    page.say(f"The worst is {worst}, and {reasons[most]} ({shown(row[most])} of its prompt tokens).")


def prefixes(page: Notebook) -> None:
    """What hot beginnings cost."""
    page.title("What do hot prefixes cost?", 3)
    page.say(
        "`hot_prefixes` counts requests by the block that ends their first 512 tokens, so by system prompt or document."
    )
    page.ask("SELECT prefix, requests, tokens, matched, nodes, last FROM hot_prefixes ORDER BY requests DESC LIMIT 5")
    page.say(
        "What they cost is what was computed of them. The copies are the nodes that stored that block at least once."
    )
    rows = page.ask("""
        WITH stored AS (
          SELECT hash AS prefix, count(DISTINCT node) AS copies, count(*) AS times
          FROM (SELECT node, unnest(hashes) AS hash FROM cache_changes WHERE change IN ('stored', 'placed'))
          GROUP BY hash
        )
        SELECT d.prefix, count(*) AS requests, copies, times AS times_stored,
          sum(c.prompt_tokens - c.cached_tokens)::UBIGINT AS computed_tokens,
          sum(c.cached_tokens) / sum(c.prompt_tokens) AS hit_rate
        FROM decisions d JOIN completions c ON c.routed = d.sequence AND c.request = d.request
          LEFT JOIN stored USING (prefix)
        GROUP BY ALL ORDER BY requests DESC LIMIT 5
    """)
    page.say(
        f"The hottest one lay on {rows[0]['copies']} nodes and was stored {rows[0]['times_stored']} times. Where the "
        "times are "
        "more than the copies, it was evicted, or its node was lost, and it was computed again."
    )


def predictions(page: Notebook) -> None:
    """Whether routers know what nodes hold."""
    page.title("Does the router predict right?", 3)
    rows = page.ask("""
        SELECT node, sum(requests) AS requests,
          sum("right" * requests) / sum(requests) AS right_share,
          sum("over") / sum(predicted_tokens) AS "over",
          sum("under") / sum(cached_tokens) AS "under"
        FROM match_predicted_vs_delivered GROUP BY node ORDER BY node
    """)
    least = min(rows, key=lambda row: row["right_share"])
    page.say(
        "`right_share` is the share of requests for which the engine found exactly what the router expected. `over` "
        "was expected and not found, because it was evicted between the decision and the start. `under` was found and "
        "not expected: a request before it in the same queue computed it meanwhile, which a queue makes likely. "
        f"It is least right about {least['node']}."
    )


def moves(page: Notebook) -> None:
    """Where sessions went, and why."""
    page.title("Which sessions moved, and why?", 3)
    page.ask("""
        SELECT from_node, to_node, count(*) AS moves, count(DISTINCT session) AS sessions
        FROM session_moves GROUP BY ALL ORDER BY moves DESC, from_node, to_node LIMIT 5
    """)
    page.say(
        "A session moves because its node was lost or cordoned since the session came to it, or because the policy "
        "found another node cheaper. `policy_changes` says which policy that was."
    )
    page.ask("""
        WITH steps AS (
          SELECT session, node, change, sequence,
            lag(node) OVER session AS from_node, lag(sequence) OVER session AS since
          FROM session_changes WINDOW session AS (PARTITION BY model, session ORDER BY sequence, event)
        ), moves AS (
          SELECT s.session, s.sequence, coalesce(any_value(n.change), 'another node cost less') AS why
          FROM steps s LEFT JOIN node_changes n
            ON n.node = s.from_node AND n.sequence BETWEEN s.since AND s.sequence AND n.change IN ('lost', 'cordoned')
          WHERE s.change = 'moved' GROUP BY ALL
        )
        SELECT policy, why, count(*) AS moves, count(DISTINCT session) AS sessions
        FROM moves ASOF JOIN policy_changes p ON moves.sequence >= p.sequence
        GROUP BY ALL ORDER BY moves DESC, policy, why
    """)
    page.say(
        "`ASOF JOIN` takes the last policy before each move. To see one session's way: "
        "`SELECT * FROM session_changes WHERE session = '...' ORDER BY sequence`."
    )


def node(page: Notebook) -> None:
    """A node's story."""
    page.title(f"What happened to {LOST}?", 3)
    page.ask(f"SELECT time, change, reason, seconds FROM node_timeline WHERE node = '{LOST}' ORDER BY sequence")
    page.say("Each registration begins an epoch with an empty cache. What it stored and evicted in each:")
    page.ask(f"""
        SELECT epoch, min(time) AS first, max(time) AS last,
          sum(blocks) FILTER (change = 'stored')::UBIGINT AS stored, sum(evicted_blocks)::UBIGINT AS evicted
        FROM cache_changes WHERE node = '{LOST}' GROUP BY epoch ORDER BY epoch
    """)
    page.say("Requests that ran there when it was lost were sent again. A request with several decisions:")
    page.ask("""
        SELECT request, list(node ORDER BY sequence) AS nodes, last(exclude ORDER BY sequence) AS excluded,
          min(time) AS first, max(time) AS last
        FROM decisions GROUP BY request HAVING count(*) > 1 ORDER BY first LIMIT 5
    """)


def evictions(page: Notebook) -> None:
    """How much leaves the caches."""
    page.title("How much is evicted?", 3)
    page.ask("""
        SELECT node, any_value(capacity_blocks) AS capacity, sum(stored)::UBIGINT AS stored, sum(evicted)::UBIGINT AS evicted,
          sum(stored) / any_value(capacity_blocks) AS turnover
        FROM evictions_by_node JOIN nodes USING (node) GROUP BY node ORDER BY node
    """)
    page.say(
        "Eviction costs nothing until what left is wanted again. Blocks that a node stored more than once in one life:"
    )
    rows = page.ask("""
        SELECT node, count(*) AS stored, count(*) - count(DISTINCT (epoch, hash)) AS again,
          again / stored AS share
        FROM (SELECT node, epoch, unnest(hashes) AS hash FROM cache_changes WHERE change = 'stored')
        GROUP BY node ORDER BY node
    """)
    again, stored = sum(row["again"] for row in rows), sum(row["stored"] for row in rows)
    page.say(
        f"Of {stored:,} blocks, {again:,} ({again / stored:.0%}) were computed again after they had been evicted: so "
        "much a "
        "larger cache would have saved on the same nodes."
    )


def regret(page: Notebook) -> None:
    """Whether another node held more."""
    page.title("Was another node better?", 3)
    rows = page.ask('SELECT policy, requests, passed_over, "match", best_match, tokens FROM regret ORDER BY policy')
    for row in rows:
        page.say(
            f"`{row['policy']}` passed over a longer match in {row['passed_over']:,} of {row['requests']:,} decisions "
            f"({row['passed_over'] / row['requests']:.0%}), {row['tokens']:,} cached tokens in all."
        )
    page.say(
        "That is no fault in itself: a node with a shorter match and no queue may answer sooner. Compare the times of "
        "both:"
    )
    page.ask("""
        SELECT d.policy, d.best_match > d."match" AS passed_over, count(*) AS requests,
          avg(c.ttft) AS mean_ttft, quantile_cont(c.ttft, 0.9) AS p90_ttft
        FROM decisions d JOIN completions c ON c.routed = d.sequence AND c.request = d.request
        WHERE c.status = 'ok' GROUP BY ALL ORDER BY ALL
    """)


def first_tokens(page: Notebook) -> None:
    """How long first tokens take."""
    page.title("How long do first tokens take, by policy?", 3)
    page.ask("SELECT policy, requests, mean, p50, p90, p99, hit_rate FROM ttft_by_policy ORDER BY policy")
    page.say(
        "The policies were not in force under the same load, so look at the times as well; a fair comparison on one "
        "trace is `kvplane simulate`."
    )
    page.ask("""
        SELECT time_bucket(INTERVAL 4 MINUTES, time) AS begins, policy, count(*) AS requests,
          avg(ttft) AS mean, quantile_cont(ttft, 0.99) AS p99
        FROM completions WHERE status = 'ok' AND routed IS NOT NULL GROUP BY ALL ORDER BY begins, policy
    """)


def bad_commits(page: Notebook) -> None:
    """Who writes what nobody accepts."""
    page.title("Who writes bad commits?", 3)
    page.ask("SELECT reason, commits, first_time, last_time, names, writers FROM skipped_commits ORDER BY reason")
    page.say(
        "A skipped commit is kept as it was, with its headers and body. (`try`: a stranger's headers may hold anything.)"
    )
    page.ask("""
        SELECT try(headers->>'Kv-Writer') AS writer, subject, skipped, count(*) AS commits, any_value(detail) AS detail
        FROM commits WHERE skipped IS NOT NULL GROUP BY ALL ORDER BY commits DESC, writer
    """)
    page.say(
        "`SELECT decode(body) FROM commits WHERE sequence = ...` shows a body that is JSON; the reasons are "
        "[below](#why-a-commit-is-skipped)."
    )


QUESTIONS = (hit_rate, prefixes, predictions, moves, node, evictions, regret, first_tokens, bad_commits)
