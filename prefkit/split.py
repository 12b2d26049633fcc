"""Train and test by prompt, never by row: pairs of one prompt, and of those nearly the same, lie on one side.

The decision is a hash of the smallest prompt_id of a cluster and of the seed, so that it depends on nothing but the
content: more rows move no prompt.
"""

import hashlib


def is_test(prompt_id: str, test_share: float, seed: int) -> bool:
    """Whether a prompt is held out: the first 8 bytes of sha256("seed:prompt_id") below test_share of their range."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < test_share * 2**64
