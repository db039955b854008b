"""Random numbers that are functions of a key: no state, the same on every process and after a resume."""

from __future__ import annotations

from functools import lru_cache

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit numbers that looks random."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _fold(key: tuple[int, ...]) -> int:
    k = 0
    for part in key:
        k = _mix(k ^ (part & _MASK))
    return k


def draw(n: int, key: tuple[int, ...]) -> int:
    """A number of ``range(n)``, each as likely as the others, decided by the key."""
    return _fold(key) % n


def permute(index: int, n: int, key: tuple[int, ...]) -> int:
    """A keyed pseudo-random permutation of ``range(n)``, computed for one index without a table.

    A four-round Feistel network over the next even number of bits; values past ``n`` are permuted again until they
    fall inside (cycle walking), which keeps it a bijection. Where ``n`` and ``m`` have as many bits, most of
    ``range(n)`` goes where it goes in ``range(m)``.
    """
    half, mask, k = _network(n, key)
    while True:
        left, right = index >> half, index & mask
        for r in range(4):
            left, right = right, left ^ (_mix(k ^ (right << 3) ^ r) & mask)
        index = (left << half) | right
        if index < n:
            return index


def place_of(index: int, n: int, key: tuple[int, ...]) -> int:
    """Where ``index`` comes from: ``permute(place_of(index, n, key), n, key) == index``."""
    half, mask, k = _network(n, key)
    while True:
        left, right = index >> half, index & mask
        for r in reversed(range(4)):
            left, right = right ^ (_mix(k ^ (left << 3) ^ r) & mask), left
        index = (left << half) | right
        if index < n:
            return index


@lru_cache(16)
def _network(n: int, key: tuple[int, ...]) -> tuple[int, int, int]:
    half = max((n - 1).bit_length() + 1, 2) // 2
    return half, (1 << half) - 1, _fold(key)
