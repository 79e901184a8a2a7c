"""How long one step of an engine takes: a roofline, calibrated with published figures.

A step computes the chunks of prompts that are in it and one token for each request that decodes. It reads the weights
once and the keys and values of all contexts, and does 2 operations per parameter and token, plus attention, which is
4 * layers * hidden operations per pair of tokens:

    step = fixed + max(weights / bandwidth, 2 * parameters * tokens / operations)
           + 4 * layers * hidden * pairs / operations + bytes_per_token * context / bandwidth + per_request * decoding

`bandwidth` and `operations` are the data sheet's, times an efficiency. Efficiencies and the two constants were fitted to
what TensorRT-LLM's performance overview publishes for this model and GPU (`PUBLISHED`, release 1.0, table "Llama 3.3
70B", column B200 TP1 FP4): output tokens per second under full load. `tests/simulation/test_engine.py` holds the model to it.
Other models and GPUs are in `catalog`.
"""

from __future__ import annotations

from msgspec import Struct

PUBLISHED = {
    (128, 128): 11_147, (128, 2048): 9_922, (128, 4096): 6_831, (500, 2000): 7_762, (1000, 1000): 7_007,
    (1000, 2000): 6_271, (2048, 128): 1_339, (2048, 2048): 4_783, (5000, 500): 1_459, (20000, 2000): 665,
}  # fmt: skip
"""Output tokens per second of Llama 3.3 70B (FP4) on one B200, by prompt and answer length in tokens."""


class Hardware(Struct, frozen=True, kw_only=True):
    """One model on one node. Defaults: Llama 3.3 70B in FP4 on one B200."""

    name: str = "Llama 3.3 70B FP4, B200"
    parameters: float = 70.6e9
    weight_bytes: float = 40e9
    attention_operations: float = 4 * 80 * 8192
    """Operations per pair of tokens."""
    kv_bytes: float = 2 * 80 * 8 * 128
    """Bytes of keys and values per token (FP8)."""
    operations: float = 9e15 * 0.395
    """Operations per second that are reached."""
    bandwidth: float = 8e12 * 0.54
    """Bytes per second that are reached."""
    fixed: float = 0.0011
    """Seconds of a step beside all work."""
    per_request: float = 3e-6
    """Seconds that each decoding request adds to a step."""
    step_tokens: int = 8192
    """Most tokens in a step (vLLM: `max_num_batched_tokens`)."""
    most_running: int = 1024
    """Most requests at once (vLLM: `max_num_seqs`)."""
    cache_tokens: int = 3_000_000
    """Tokens whose keys and values a node holds: what its GPU's memory and some 400 GB of its host's have room for."""

    def step(self, tokens: int, pairs: float, decoding: int, context: int) -> float:
        """Seconds of one step.

        `tokens` of prompts with `pairs` of tokens attending to each other, and `decoding` requests whose contexts hold
        `context` tokens in all.
        """
        work = max(self.weight_bytes / self.bandwidth, 2 * self.parameters * (tokens + decoding) / self.operations)
        return (
            self.fixed + work + self.attention_operations * pairs / self.operations
            + self.kv_bytes * context / self.bandwidth + self.per_request * decoding
        )  # fmt: skip

    def decode_steps(self, count: int, decoding: int, context: int) -> float:
        """Seconds of `count` steps in which nothing but decoding happens; the context grows by one token a request."""
        growth = self.kv_bytes * decoding / self.bandwidth
        return count * self.step(0, 0, decoding, context) + growth * count * (count - 1) / 2

    @property
    def prefill_speed(self) -> float:
        """Tokens per second of prefill alone, at a context of 4,096 tokens; what a node says of itself."""
        tokens = self.step_tokens
        return tokens / self.step(tokens, tokens * 4096.0, 0, 4096)

    def decode_speed(self, requests: int, context: int = 0) -> float:
        """Tokens per second of so many requests together that only decode, each at a context of so many tokens."""
        return requests / self.step(0, 0, requests, requests * context)
