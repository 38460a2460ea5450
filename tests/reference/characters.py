"""Hashes of strings, one string and one character at a time, in Python's integers."""


def key(text):
    """The key (int64) of an id of text in an index."""
    mixed = 0xCBF29CE484222325
    for character in map(ord, text):
        mixed = (mixed ^ character) * 0x9E3779B97F4A7C15 % 2**64
        mixed ^= mixed >> 32
    mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed ^= mixed >> 32
    signed = mixed - 2**64 if mixed >= 2**63 else mixed
    return 0 if signed == -(2**63) else signed
