"""Making nkeys: a seed is kept by the one who logs in, its public key is what servers know."""

from __future__ import annotations

import os

import nkeys

from kvplane.events.log.credentials import Seed, public_key

_SEED_BYTES = 32


def new_seed() -> Seed:
    """A user's seed."""
    text: str = nkeys.encode_seed(os.urandom(_SEED_BYTES), nkeys.PREFIX_BYTE_USER).decode()
    return Seed(text, public_key(text))
