"""Errors of this package. Each says whose fault it is and what to do; `code` is for programs."""

from __future__ import annotations


class KvplaneError(Exception):
    """Base of all errors that kvplane raises on purpose. `code` is stable, the sentence is for people."""

    code = "error"


class BadName(KvplaneError):
    """A fleet, node, model, session or writer name that can't be used. The caller's fault."""

    code = "bad_name"


class BadHashes(KvplaneError):
    """Tokens or hashes that can't be turned into block hashes. The caller's fault."""

    code = "bad_hashes"


class BadCommit(KvplaneError):
    """A message on the log that is no valid commit for its subject. The writer's fault; every reader skips it.

    `code` is one of the reasons in `codec.REASONS`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.code = reason


class BadCredentials(KvplaneError):
    """A file of credentials or certificates that can't be used. The caller's fault."""

    code = "bad_credentials"


class BadServer(KvplaneError):
    """The address of a server that is none. The caller's fault."""

    code = "bad_server"


class LogError(KvplaneError):
    """The log could not be used."""

    code = "log"


class LogUnavailable(LogError):
    """The log did not acknowledge in time. The commit may or may not be stored; a retry has the same id."""

    code = "log_unavailable"


class ConnectionLost(LogUnavailable):
    """The connection was replaced while an answer was waited for; it may have been lost with it. Ask again."""


class LogMissing(LogError):
    """The fleet's stream does not exist, or the server has no JetStream."""

    code = "log_missing"


class TwoLogs(LogMissing):
    """There is no log here, and the fleet has one elsewhere. Whoever starts the service must say which is meant."""

    code = "two_logs"


class LogCorrupt(LogError):
    """A gap in the sequence or a stream that does not hold what it must. Never skipped silently."""

    code = "log_corrupt"


class LogPurged(LogCorrupt):
    """The log begins later than where the reader is: it was compacted meanwhile. A newer snapshot leads on."""


class LogUnfit(LogCorrupt):
    """The stream's settings are not those of a log: it may forget, or store nothing. Whoever runs the server set them."""


class LogHole(LogCorrupt):
    """Messages are missing inside the log: they were purged by subject, or deleted. A newer snapshot leads on."""


class NewerFormat(LogError):
    """The log has gone on to a format that this kvplane does not know. Never guessed at."""

    code = "newer_format"


class LoginRefused(LogError):
    """The server does not let these credentials in, or no longer. Trying again won't help."""

    code = "login_refused"


class WrongServer(LogError):
    """What answers at the address is no NATS server, or none for clients. Trying again won't help."""

    code = "wrong_server"


class ServerTooOld(LogError):
    """The NATS server is of a version that lacks what kvplane uses. Trying again won't help."""

    code = "server_too_old"


class NotAllowed(LogError):
    """The credentials are valid and may not do this. Another role's may."""

    code = "not_allowed"


class UntrustedServer(LogError):
    """The server's certificate is not one that was to be trusted, or it offers no encryption where it must."""

    code = "untrusted_server"


class LostRace(LogError):
    """Another writer changed the subject first. Read on and decide again."""

    code = "lost_race"


class CommitTooLarge(LogError):
    """One event alone is larger than the server's message limit, or a commit holds too many events."""

    code = "commit_too_large"


def first_known(group: BaseExceptionGroup[BaseException]) -> KvplaneError | None:
    """The first error in a group that is ours."""
    for error in group.exceptions:
        if isinstance(error, KvplaneError):
            return error
        if isinstance(error, BaseExceptionGroup) and (found := first_known(error)) is not None:
            return found
    return None
