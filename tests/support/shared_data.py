"""Real data that lies beside the checkout: used where it is there, never needed."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"


TRACE = SHARED / "traces" / "conversation_trace.jsonl"
AGENTS = SHARED / "traces" / "agents.jsonl"
