"""Errors of the services. Each becomes an error answer of the micro protocol: `status` is its code there."""

from __future__ import annotations

from kvplane.events.errors import KvplaneError


class ServiceFault(KvplaneError):
    """An error that is answered to the one who asked. `code` is stable, `status` is in the manner of HTTP."""

    status = 500
    code = "internal"
    retry_after = 0.0
    """Seconds after which it may go; 0 where that is not known."""


class BadRequest(ServiceFault):
    """The request is malformed. Asking again won't help."""

    status = 400
    code = "bad_request"


class Unauthorized(ServiceFault):
    """A gateway asks for a key, and the request has none that is right."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ServiceFault):
    """The request's key is not for what it asks for."""

    status = 403
    code = "not_allowed"


class LimitExceeded(ServiceFault):
    """The tenant has had as much as it may for now. `headers` are those of an HTTP answer that say so."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, sentence: str, *, retry_after: float, headers: list[tuple[bytes, bytes]]) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after
        self.headers = headers


class TooLarge(ServiceFault):
    """The request alone is more than its tenant may ever have at once."""

    status = 413
    code = "request_too_large"


class NotYours(ServiceFault):
    """A node asked on its own subject for something about another node."""

    status = 403
    code = "not_yours"


class UnknownModel(ServiceFault):
    """No node of the fleet serves the model."""

    status = 404
    code = "unknown_model"


class UnknownNode(ServiceFault):
    """The node is not registered."""

    status = 404
    code = "unknown_node"


class NoTokenizer(ServiceFault):
    """A prompt was given as text, and no tokenizer is known for the model."""

    status = 422
    code = "no_tokenizer"


class Conflict(ServiceFault):
    """What is asked for contradicts what is."""

    status = 409
    code = "conflict"


class NodeExists(Conflict):
    """A node of this name is registered and alive."""

    code = "node_exists"


class NoRoom(ServiceFault):
    """Eviction can't make enough room."""

    status = 507
    code = "no_room"


class NoNode(ServiceFault):
    """Nodes serve the model, but none may be chosen now."""

    status = 503
    code = "no_node"


class Overloaded(ServiceFault):
    """Every node that could serve the request runs as many as it may."""

    status = 429
    code = "overloaded"


class QueueFull(Overloaded):
    """And as many wait for a place as may."""

    status = 503
    code = "queue_full"


class TooOften(ServiceFault):
    """It was asked for too often; later it may be again."""

    status = 429
    code = "too_often"


class NotReady(ServiceFault):
    """The service has not yet read the log to its end."""

    status = 503
    code = "not_ready"


class Busy(ServiceFault):
    """Others were before this, and it waited for too long."""

    status = 503
    code = "busy"


class LogAway(ServiceFault):
    """The log does not acknowledge; nothing was decided."""

    status = 503
    code = "log_unavailable"


class ConnectionBroken(KvplaneError):
    """The connection to the NATS server is broken for good; the service must be started anew."""

    code = "connection_broken"


class HttpFailed(KvplaneError):
    """The address for metrics and health can't be listened on."""

    code = "http_failed"


class BadHttp(ServiceFault):
    """What came over HTTP can't be read, or is more than is taken. The connection is closed."""

    code = "bad_http"

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class BadAnswer(KvplaneError):
    """What an engine answers can't be read."""

    code = "bad_answer"


class ServerFailed(KvplaneError):
    """The embedded server did not start."""

    code = "server_failed"


class OutputFailed(KvplaneError):
    """What a command prints can't be written, since the disk is full or there is none."""

    code = "output_failed"


class FolderTaken(KvplaneError):
    """Another process owns the folder. The sentence says which, and what to do."""

    code = "folder_taken"


class BadTrace(KvplaneError):
    """A trace file that can't be read."""

    code = "bad_trace"


class Refused(ServiceFault):
    """A service answered with an error; `code`, `status` and the sentence are its own."""

    def __init__(self, status: int, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code


class NoAnswer(ServiceFault):
    """No service answered in time."""

    status = 504
    code = "no_answer"


class NotVouched(ServiceFault):
    """No running replica vouches for a past that a historian gives."""

    status = 503
    code = "not_vouched"


class NotServed(KvplaneError):
    """A simulated fleet could serve no request at all."""

    code = "not_served"


class PolicyFailed(KvplaneError):
    """A policy that failed in every decision of a simulation, so that there are no figures of it."""

    code = "policy_failed"


class StepFailed(KvplaneError):
    """A step of the demonstration did not hold."""

    code = "step_failed"


class BeforeHistory(ServiceFault):
    """A moment of which nothing is known any more."""

    status = 404
    code = "before_history"


class NotYet(ServiceFault):
    """A moment that the log has not reached."""

    status = 404
    code = "not_yet"


class UnknownRequest(ServiceFault):
    """The history holds no decision about the request."""

    status = 404
    code = "unknown_request"


class BadSql(BadRequest):
    """A question that is no single read-only statement, or that DuckDB can't answer as it is written."""

    code = "bad_sql"


class QueryLimit(ServiceFault):
    """A query asked for more than it may have. `code`: `time_limit`, `memory_limit`, `row_limit` or `busy`."""

    status = 422

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class DatabaseFailed(ServiceFault):
    """DuckDB has given up on its whole instance: nothing can be read or written until the owner opens it anew."""

    status = 503
    code = "database_failed"


class WorkerDied(ServiceFault):
    """The process that worked on an answer was killed."""

    code = "worker_died"


class AnswerTooLarge(ServiceFault):
    """The answer does not fit a message."""

    status = 413
    code = "answer_too_large"


class BadBatch(KvplaneError):
    """An engine's message that can't be understood: its news about its cache are lost."""

    code = "bad_batch"


class EngineUnfit(KvplaneError):
    """An engine that can't be a node as it was started, or can't be reached. The sentence names the flag to set."""

    code = "engine_unfit"


class EngineFailed(ServiceFault):
    """An engine did not do what it was asked; another one may."""

    status = 502
    code = "engine_failed"


class EngineRefused(ServiceFault):
    """An engine would not have the request. `status` is the engine's; another engine would say the same."""

    code = "engine_refused"

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
