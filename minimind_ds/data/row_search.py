"""Which lengths fill a row to the last token: best-fit decreasing whose "best" is over subsets, not single items.

A row is opened with the longest item left and completed with items in a random order whose lengths sum to exactly what
remains.  Sums of subsets are the bits of one big integer, so a row costs some ten microseconds.  packing.py turns
samples into items and rows into plans; here are lengths only, and the same arguments give the same rows anywhere.

    python -c "from minimind_ds.data.row_search import fill_rows as f; print(f([5, 4, 3, 2], 8, [3, 1, 2, 0], 0))"
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np

# A search looks at this many items before it takes the best fit found; most end within twenty.
WINDOW = 96
# How hard repack() tries depends on whether this fill is missed and could be had.
GOOD_FILL = 0.995


class _Stock:
    """Items that are in no row yet: drawn in a given order, or asked for by length."""

    def __init__(self, lengths: list[int], draw_order: list[int], pack_len: int):
        self.lengths, self.draw_order, self.pack_len = lengths, draw_order, pack_len
        self.used = bytearray(len(lengths))
        self.left = len(lengths)
        self.window: list[int] = []
        self.drawn = 0
        # Popping from the end gives each length's items in draw order; used ones are passed over when they come up.
        self.by_length: dict[int, list[int]] = {}
        for item in reversed(draw_order):
            self.by_length.setdefault(lengths[item], []).append(item)
        self.count = {length: len(items) for length, items in self.by_length.items()}
        # Bit pack_len - length is set while an item of that length is left.
        self.mirror = 0
        for length in self.count:
            self.mirror |= 1 << (pack_len - length)

    def take(self, item: int):
        length = self.lengths[item]
        self.used[item] = 1
        self.left -= 1
        self.count[length] -= 1
        if not self.count[length]:
            self.mirror ^= 1 << (self.pack_len - length)

    def candidates(self) -> Iterator[int]:
        """At most WINDOW items: those that earlier searches passed over, then new ones in draw order."""
        used, draw_order = self.used, self.draw_order
        self.window = window = [item for item in self.window if not used[item]]
        yield from window
        while len(window) < WINDOW and self.drawn < len(draw_order):
            item = draw_order[self.drawn]
            self.drawn += 1
            if not used[item]:
                window.append(item)
                yield item

    def of_length(self, length: int, besides: list[int]) -> int | None:
        """The next item of this length that is not one of `besides`, or None."""
        items = self.by_length[length]
        while self.used[items[-1]]:
            items.pop()
        return next((item for item in reversed(items) if not self.used[item] and item not in besides), None)


def fill_rows(lengths: list[int], pack_len: int, draw_order: list[int], stop_at: int) -> list[list[int]]:
    """Rows of items, until at most `stop_at` are left.  `lengths` falls, so that the next item left is the longest."""
    stock = _Stock(lengths, draw_order, pack_len)
    rows: list[list[int]] = []
    longest = 0
    while stock.left > stop_at:
        while stock.used[longest]:
            longest += 1
        stock.take(longest)
        row = [longest]
        # The last bit of the mirror is the shortest item left.
        if stock.mirror.bit_length() > pack_len - (room := pack_len - lengths[longest]):
            row += _best_subset(stock, room)
            for item in row[1:]:
                stock.take(item)
        rows.append(row)
    return rows


def _best_subset(stock: _Stock, room: int) -> list[int]:
    """Items whose lengths sum to `room`, or as near below it as the search finds.

    Sums of subsets of the window are the bits of one integer, and the search ends at the first item that makes the sum
    exact.  If none does, one more item, of any length left, may close the row.
    """
    lengths = stock.lengths
    reach, mask = 1, (2 << room) - 1
    before: list[tuple[int, int]] = []
    for item in stock.candidates():
        length = lengths[item]
        if length <= room:
            before.append((reach, item))
            reach |= (reach << length) & mask
            if reach.bit_length() > room:
                return _walk_back(before, room, lengths)
    total = reach.bit_length() - 1
    mirror = stock.mirror >> (stock.pack_len - room)
    gap = _nearest(reach, mirror, 0)
    while gap < room - total:
        hits = reach & (mirror >> gap)
        while hits:
            total_before = hits.bit_length() - 1
            chosen = _walk_back(before, total_before, lengths)
            closing = stock.of_length(room - gap - total_before, chosen)
            if closing is not None:
                return [*chosen, closing]
            hits ^= 1 << total_before
        gap = _nearest(reach, mirror, gap + 1)
    return _walk_back(before, total, lengths)


def _nearest(reach: int, mirror: int, start: int) -> int:
    """The smallest gap >= start at which `reach & (mirror >> gap)` is not 0; if there is none, a gap past all."""
    spread = [mirror >> start]
    while not reach & spread[-1]:
        if not spread[-1]:
            return mirror.bit_length() + start
        spread.append(spread[-1] | spread[-1] >> (1 << (len(spread) - 1)))
        if len(spread) > 40:
            return mirror.bit_length() + start
    gap = 0
    for power in range(len(spread) - 2, -1, -1):
        if not reach & (spread[power] >> gap):
            gap += 1 << power
    return start + gap


def _walk_back(before: list[tuple[int, int]], total: int, lengths: list[int]) -> list[int]:
    """Items that sum to `total`; `before` pairs each with the sums reachable without it.

    An item is taken only where the ones before it cannot reach the sum, so those that waited longest go first.
    """
    chosen = []
    for reach, item in reversed(before):
        if not total:
            break
        if not reach >> total & 1:
            chosen.append(item)
            total -= lengths[item]
    return chosen


def repack(rows: list[list[int]], lengths: list[int], pack_len: int, seed: int) -> list[list[int]]:
    """Take a few rows apart, most of them with room left, and fill them again; keep what gathers the room in few rows.

    A small set ends with a handful of items that do not complete each other, and then a row counts: this empties it.
    It stops at the fewest rows there can be, and gives up early where that is far away or would not show.
    """
    dice = random.Random(f"repack {seed}")
    fewest, total = fewest_rows(lengths, pack_len), sum(lengths)
    packed = [(pack_len - sum(lengths[item] for item in row), row) for row in rows]
    # slack ** 1.5, scaled, in integers: the same decisions on any machine.
    worth = [math.isqrt(slack**3 << 16) for slack in range(pack_len + 1)]
    for attempt in range(8000):
        n_rows = len(packed)
        short_of_goal = total < GOOD_FILL * n_rows * pack_len and total >= GOOD_FILL * fewest * pack_len
        if n_rows <= fewest or attempt >= (300 if not short_of_goal else 2000 if n_rows > fewest + 1 else 8000):
            break
        packed.sort(reverse=True)
        n_slack = next((i for i, (slack, _) in enumerate(packed) if not slack), n_rows)
        chosen = {i for i in (0, 1) if dice.random() < 0.5 and i < n_slack}
        chosen |= {int(dice.random() * n_slack) for _ in range(int(dice.random() * 7))}
        while len(chosen) < min(16, n_rows):
            chosen.add(int(dice.random() * n_rows))
        items = sorted(item for i in chosen for item in packed[i][1])
        draw_order = sorted(range(len(items)), key=lambda _: dice.random())
        local = [lengths[item] for item in items]
        new = fill_rows(local, pack_len, draw_order, 0)
        if len(new) > len(chosen):
            continue
        refilled = [(pack_len - sum(local[i] for i in row), [items[i] for i in row]) for row in new]
        gain = sum(worth[slack] for slack, _ in refilled) + (len(chosen) - len(new)) * worth[pack_len]
        gain -= sum(worth[packed[i][0]] for i in chosen)
        # A small loss now and then (0 half of the time, else 40, 80, ...) keeps the search from getting stuck.
        if gain >= (math.frexp(dice.random())[1]) * (40 << 8):
            packed = [row for i, row in enumerate(packed) if i not in chosen] + refilled
    return [row for _, row in packed]


def fewest_rows(lengths: list[int], pack_len: int) -> int:
    """No packing has fewer rows (the bound L2 of Martello and Toth, 1990): items over half a row never share one."""
    count = np.bincount(lengths, minlength=pack_len + 1)
    tokens = count * np.arange(pack_len + 1)
    n_up_to, tokens_up_to = np.cumsum(count), np.cumsum(tokens)
    small = np.arange(1, pack_len // 2 + 1)
    half, alone = pack_len // 2, pack_len - small
    n_alone, n_large = n_up_to[-1] - n_up_to[alone], n_up_to[alone] - n_up_to[half]
    room = n_large * pack_len - (tokens_up_to[alone] - tokens_up_to[half])
    more = -((room - (tokens_up_to[half] - tokens_up_to[small - 1])) // pack_len)
    bounds = n_alone + n_large + np.maximum(more, 0)
    return max(-(-sum(lengths) // pack_len), int(bounds.max(initial=0)))
