"""Hashes of strings, one string and one character at a time, in Python's integers; and as released, over padded arrays."""

import numpy as np


def key(text):
    """The key (int64) and mark (uint32) of an id of text in an index."""
    mixed, mark = 0xCBF29CE484222325, 0x811C9DC5
    for character in map(ord, text):
        mixed = (mixed ^ character) * 0x9E3779B97F4A7C15 % 2**64
        mixed ^= mixed >> 32
        mark = (mark ^ character) * 0x01000193 % 2**32
    mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed ^= mixed >> 32
    signed = mixed - 2**64 if mixed >= 2**63 else mixed
    return (0 if signed == -(2**63) else signed), mark


def words(strings):
    """uint64 [n]: what `hash_ids` reduces to rows, column by column of an array as wide as its longest string."""
    array = np.array(strings)
    width = array.dtype.itemsize // 4
    result, step = np.zeros(len(strings), np.uint64), np.uint64(0x9E3779B97F4A7C15)
    for column in array.view(np.uint32).reshape(len(strings), width).T if width else ():
        value = (result ^ column.astype(np.uint64)) + step
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result = np.where(column > 0, value ^ (value >> np.uint64(31)), result)
    return result
