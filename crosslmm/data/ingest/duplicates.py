"""Find rows whose ids appear more than once in a manifest, from the hashes of all ids."""

import numpy as np


def find_duplicates(hashes: list[np.ndarray], lines: list[np.ndarray]) -> dict[int, list[tuple[int, int]]]:
    """Return, by chunk number, (line, first line with the same id) of each row whose id appeared before.

    Args:
        hashes: hashes of the ids of each chunk, uint64 (rows,).
        lines: lines of the rows of each chunk, int64 (rows,).
    """
    if not any(map(len, hashes)):
        return {}
    ends, ids, line = np.cumsum([len(chunk) for chunk in hashes]), np.concatenate(hashes), np.concatenate(lines)
    order = np.argsort(ids, kind="stable")
    is_first = np.concatenate([[True], np.diff(ids[order]) != 0])
    first = order[is_first][np.cumsum(is_first) - 1]
    duplicates: dict[int, list[tuple[int, int]]] = {}
    for row, earlier in sorted(zip(order[~is_first].tolist(), first[~is_first].tolist(), strict=True)):
        chunk = int(np.searchsorted(ends, row, side="right"))
        duplicates.setdefault(chunk, []).append((int(line[row]), int(line[earlier])))
    return duplicates
