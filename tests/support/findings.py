"""What the doctor finds, without what is well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplane.services.diagnosis.doctor import judge

if TYPE_CHECKING:
    from kvplane.services.diagnosis.examine import Examined


def wrong(found: Examined) -> set[tuple[str, str]]:
    return {(finding.level, finding.what) for finding in judge(found) if finding.level not in {"ok", "unseen"}}


def sentence(found: Examined, what: str) -> str:
    return next(finding.message for finding in judge(found) if finding.what == what and finding.level != "ok")
