"""Hardware by name, `model@gpu`, or from what somebody measured: what `--hardware` takes.

Every entry is the roofline of `hardware` with the data sheet's dense operations and bandwidth. Where TensorRT-LLM publishes
throughputs (performance overview, release 1.0), the two efficiencies and the two constants were fitted to them, and
`tests/simulation/test_catalog.py` holds the entry to them. The others have the efficiencies of `BASIS` and are estimates.
`docs/hardware.md` shows the table.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from kvplane.services.protocol.errors import BadRequest
from kvplane.services.routing.choice import parse
from kvplane.services.simulation.hardware import PUBLISHED, Hardware

if TYPE_CHECKING:
    from collections.abc import Mapping

MEMORY_SHARE = 0.88
"""Share of the GPU's memory that weights and cache have; engines keep the rest for what they compute with."""
LENGTHS = tuple(PUBLISHED)
BASIS = "llama-3.1-8b@h100"
SETTINGS = ("cache", "step_tokens", "most_running")
MEASURED = ("prefill", "decode", "batch", "batch_decode")


class Model(Struct, frozen=True):
    """A model in one precision."""

    parameters: float
    weight_bytes: float
    layers: int
    width: int
    """Heads times their size."""
    kv_values: int
    """Keys and values per token and layer."""
    kv_value_bytes: int = 1

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values per token."""
        return self.layers * self.kv_values * self.kv_value_bytes


class Gpu(Struct, frozen=True):
    """What the data sheet says: operations per second (dense) in the precision, bytes per second, bytes."""

    name: str
    operations: float
    bandwidth: float
    memory: float


class Fit(Struct, frozen=True):
    """Shares of the data sheet that are reached, and the two constants of a step, in seconds."""

    operations: float
    bandwidth: float
    fixed: float
    per_request: float


class Entry(Struct, frozen=True):
    """One line of the table. `published` are output tokens per second at `LENGTHS`; none where nothing is published."""

    model: Model
    title: str
    gpu: Gpu
    fit: Fit
    published: tuple[int, ...] = ()

    @property
    def kv_memory(self) -> float:
        """Bytes for keys and values."""
        return self.gpu.memory * MEMORY_SHARE - self.model.weight_bytes

    def hardware(self) -> Hardware:
        """The entry as what the simulation runs on."""
        model, gpu, fit = self.model, self.gpu, self.fit
        return Hardware(
            name=f"{self.title}, {gpu.name}", parameters=model.parameters, weight_bytes=model.weight_bytes,
            attention_operations=4 * model.layers * model.width, kv_bytes=model.kv_bytes,
            operations=gpu.operations * fit.operations, bandwidth=gpu.bandwidth * fit.bandwidth, fixed=fit.fixed,
            per_request=fit.per_request, cache_tokens=int(self.kv_memory / model.kv_bytes),
        )  # fmt: skip


_8B = Model(8.03e9, 9.1e9, 32, 4096, 2 * 8 * 128)
_8B_BF16 = Model(8.03e9, 16.1e9, 32, 4096, 2 * 8 * 128, 2)
_32B = Model(32.8e9, 34.3e9, 64, 8192, 2 * 8 * 128)
_70B = Model(70.6e9, 72.7e9, 80, 8192, 2 * 8 * 128)
_70B_FP4 = Model(70.6e9, 40e9, 80, 8192, 2 * 8 * 128)
_H100 = Gpu("H100 SXM 80 GB", 1979e12, 3.35e12, 80e9)
_H200 = Gpu("H200 SXM 141 GB", 1979e12, 4.8e12, 141e9)
_ESTIMATE = Fit(0.59, 0.9, 0.0012, 1.6e-6)

CATALOG: Mapping[str, Entry] = {
    "llama-3.1-8b@h100": Entry(
        _8B, "Llama 3.1 8B FP8", _H100, _ESTIMATE, (28312, 22714, 14325, 17660, 15220, 13899, 3450, 9305, 3459, 1351)
    ),
    "llama-3.1-8b@h200": Entry(
        _8B, "Llama 3.1 8B FP8", _H200, Fit(0.57, 0.88, 0.0021, 1.4e-6),
        (27911, 26221, 18027, 20770, 17744, 16828, 3538, 12194, 3902, 1804),
    ),
    "llama-3.3-70b@2xh100": Entry(
        _70B, "Llama 3.3 70B FP8", Gpu("two H100 SXM 80 GB", 2 * 1979e12, 2 * 3.35e12, 160e9),
        Fit(0.48, 0.73, 0.0014, 3.9e-6), (6378, 6651, 4199, 5222, 4205, 4146, 762, 3082, 898, 437),
    ),
    "llama-3.3-70b@h200": Entry(
        _70B, "Llama 3.3 70B FP8", _H200, Fit(0.56, 0.89, 0.0024, 2.9e-6),
        (3803, 4336, 2872, 3666, 2909, 2994, 442, 2003, 566, 283),
    ),
    "llama-3.3-70b@b200": Entry(
        _70B_FP4, "Llama 3.3 70B FP4", Gpu("B200 180 GB", 9e15, 8e12, 180e9), Fit(0.395, 0.54, 0.0011, 3e-6),
        tuple(PUBLISHED.values()),
    ),
    "llama-3.3-70b@gb200": Entry(
        _70B_FP4, "Llama 3.3 70B FP4", Gpu("GB200 192 GB", 10e15, 8e12, 192e9), Fit(0.38, 0.66, 0.0024, 3.3e-6),
        (12189, 11309, 7849, 9028, 7326, 6513, 1450, 5646, 1602, 755),
    ),
    "llama-3.1-8b@a100": Entry(
        _8B_BF16, "Llama 3.1 8B BF16", Gpu("A100 SXM 80 GB", 312e12, 2.04e12, 80e9), _ESTIMATE
    ),
    "llama-3.1-8b@l40s": Entry(_8B, "Llama 3.1 8B FP8", Gpu("L40S 48 GB", 733e12, 0.864e12, 48e9), _ESTIMATE),
    "qwen3-32b@h100": Entry(_32B, "Qwen3 32B FP8", _H100, _ESTIMATE),
    "qwen3-32b@h200": Entry(_32B, "Qwen3 32B FP8", _H200, _ESTIMATE),
}  # fmt: skip

HOW = (
    "name a model and GPU, or measure four numbers: prefill=TOKENS_PER_SECOND,decode=TOKENS_PER_SECOND_OF_ONE_REQUEST,"
    "batch=REQUESTS,batch_decode=TOKENS_PER_SECOND_OF_ALL"
)


def hardware(text: str) -> Hardware:
    """Read `model@gpu`, the same with settings (`:cache=500000`), or four measured numbers. Raises `BadRequest`.

    Settings are `cache` (tokens), `step_tokens` (most in a step) and `most_running` (requests).
    """
    if "=" in text and ":" not in text:
        return _measured(text, parse(f"measured:{text}").parameters)
    name, given = (choice := parse(text)).policy, choice.parameters
    if name not in CATALOG:
        raise BadRequest(f"--hardware {name!r} is not one of {', '.join(CATALOG)}; {HOW}")
    return _set(CATALOG[name].hardware(), text, given)


def _set(made: Hardware, text: str, given: Mapping[str, float]) -> Hardware:
    for name, value in given.items():
        if name not in SETTINGS:
            raise BadRequest(f"--hardware {text!r} has no setting {name!r}; there are {', '.join(SETTINGS)}")
        if value < 1:
            raise BadRequest(f"--hardware {text!r}: {name} is {value:g}; it must be at least 1")
    return replace(
        made, cache_tokens=int(given.get("cache", made.cache_tokens)),
        step_tokens=int(given.get("step_tokens", made.step_tokens)),
        most_running=int(given.get("most_running", made.most_running)),
    )  # fmt: skip


def _measured(text: str, given: Mapping[str, float]) -> Hardware:
    """A step that gives back what was measured: it reads the weights in `read` seconds, and each request costs `each`."""
    missing = [name for name in MEASURED if name not in given]
    if missing:
        raise BadRequest(f"--hardware {text!r} lacks {', '.join(missing)}; {HOW}")
    settings = {name: value for name, value in given.items() if name not in MEASURED}
    made = _set(Hardware(name=f"measured: {text}"), text, settings)
    prefill, decode, batch, together = (given[name] for name in MEASURED)
    if min(prefill, decode, together) <= 0 or batch < 2 or batch != math.floor(batch):
        raise BadRequest(f"--hardware {text!r}: speeds must be more than 0, and batch a whole number from 2 up")
    if not decode < together <= min(batch * decode, prefill):
        raise BadRequest(
            f"--hardware {text!r}: batch_decode is what {batch:g} requests decode together; it must be more than decode, and "
            f"no more than {batch:g} times that, nor than prefill"
        )
    read = (1 / decode - 1 / together) * batch / (batch - 1)
    if read < batch / prefill:
        # A step of so many requests is bound by operations, not by reading the weights.
        read = 1 / decode - 1 / together + 1 / prefill
    if made.step_tokens / prefill < read:
        raise BadRequest(
            f"--hardware {text!r}: a step takes {read:.3g} s at least, and has {made.step_tokens:,} tokens at most, so prefill "
            f"is at most {made.step_tokens / read:,.0f}; is decode that of one request alone?"
        )
    return replace(
        made, parameters=0.5, operations=prefill, weight_bytes=read, bandwidth=1.0, attention_operations=0.0, kv_bytes=0.0,
        fixed=0.0, per_request=max(0.0, 1 / decode - read),
    )  # fmt: skip


def table() -> str:
    """The table of `docs/hardware.md`."""
    lines = [
        "| name | what | prefill | decode, alone | 64 together | cache | from |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, entry in CATALOG.items():
        made = entry.hardware()
        lines.append(
            f"| `{name}` | {made.name} | {made.prefill_speed:,.0f} | {made.decode_speed(1, 1000):,.0f} | "
            f"{made.decode_speed(64, 1000):,.0f} | {made.cache_tokens:,} | {'published' if entry.published else 'estimate'} |"
        )
    return "\n".join(lines) + "\n"
