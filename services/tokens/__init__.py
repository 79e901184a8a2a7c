"""A prompt's tokens, found here: the model's own chat template and tokenizer, at the cost of what is new.

    body -> `conversation` what the engine makes of messages before its template -> `template` text -> `tokenizer` ids
         -> `prefixes` block hashes

A conversation grows at its end. A text can be cut right before certain special tokens, and its parts tokenised apart, with the
same ids as the whole (`tokenizer`). So `prefixes` keeps, by the digest of a text up to such a place, how many tokens it has
and its block hashes; only what comes after the longest known one is tokenised. `turns` goes further: it knows by the digest
of a conversation's messages where its text ended, so that of one that goes on only the new messages are rendered.

Whatever engines do in a way that can't be made again here is asked of an engine (`Elsewhere`), and a model whose tokens differ
from those of its engines is no longer believed (`proof`). A wrong token costs a cache hit and nothing else: token ids are
never sent to an engine.
"""
