"""Values as they travel out of the sandbox: exact plain types only, so that nothing with a method of its own can lie.

Runs on both sides: what a function returned and what was expected are brought to the same form.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

MAX_DEPTH = 100
_LISTS, _SETS, _DICTS = (list, tuple, deque), (set, frozenset), (dict, Counter, OrderedDict, defaultdict)


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON. A tuple is a list; a dict and a set carry their kind, and their order does not count.

    Raises `TypeError` for any other type, subclasses included, and `ValueError` for deep nesting.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if kind in _LISTS:
        return [plain(item, depth + 1) for item in value]
    if kind in _DICTS:
        pairs = [[plain(key, depth + 1), plain(item, depth + 1)] for key, item in dict.items(value)]
        return {"dict": sorted(pairs, key=repr)}
    if kind in _SETS:
        return {"set": sorted((plain(item, depth + 1) for item in value), key=repr)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (type(None), bool, int, float, str):
        return value
    raise TypeError(
        f"a {kind.__name__} cannot be compared; expected None, bool, int, float, str, list, dict, set or complex"
    )
