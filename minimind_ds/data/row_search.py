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

# A search looks at this many items, and at twice the room, before it takes the best fit found; most end by twenty.
WINDOW = 96
# repack() tries hard where this fill can be had at all.
GOOD_FILL = 0.995
ATTEMPTS = 2000


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
        """Items that earlier searches passed over, then new ones in draw order."""
        used, draw_order = self.used, self.draw_order
        self.window = window = [item for item in self.window if not used[item]]
        yield from window
        while self.drawn < len(draw_order):
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
    seen = 0
    for n_seen, item in enumerate(stock.candidates()):
        if n_seen >= WINDOW and seen >= 2 * room:
            break
        length = lengths[item]
        seen += length
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
    # spread[k] has a bit set where one of 2**k neighbouring gaps hits, so the search halves.
    spread = [mirror >> start]
    while not reach & spread[-1]:
        width = 1 << (len(spread) - 1)
        if width > spread[0].bit_length():
            return start + width
        spread.append(spread[-1] | spread[-1] >> width)
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

    A small set ends with a handful of items that do not complete each other, and there a row counts: this empties it.
    `rows` hold items, each an index into `lengths`, which falls.  Stops at the fewest rows there can be.
    """
    dice = random.Random(f"repack {seed}")
    fewest, total = fewest_rows(lengths, pack_len), sum(lengths)
    packed = [(pack_len - sum(lengths[item] for item in row), row) for row in rows]
    # room ** 1.5, scaled, in integers: the same decisions on any machine.
    worth = [math.isqrt(room**3 << 16) for room in range(pack_len + 1)]
    for attempt in range(ATTEMPTS):
        could_be_good = total >= GOOD_FILL * fewest * pack_len
        if len(packed) <= fewest or (attempt >= ATTEMPTS // 8 and not could_be_good):
            break
        packed.sort(reverse=True)
        chosen = _choose_rows([room for room, _ in packed], dice)
        items = sorted(item for row in chosen for item in packed[row][1])
        draw_order = sorted(range(len(items)), key=lambda _: dice.random())
        local = [lengths[item] for item in items]
        new = [(pack_len - sum(local[i] for i in row), [items[i] for i in row])
               for row in fill_rows(local, pack_len, draw_order, 0)]
        if len(new) > len(chosen):
            continue
        gain = sum(worth[room] for room, _ in new) + (len(chosen) - len(new)) * worth[pack_len]
        gain -= sum(worth[packed[row][0]] for row in chosen)
        # Half of the time a small loss is let pass (40, 80, 120, ... ever less often): it keeps the search moving.
        if gain >= math.frexp(dice.random())[1] * (40 << 8):
            packed = [row for i, row in enumerate(packed) if i not in chosen] + new
    return [row for _, row in packed]


def _choose_rows(rooms: list[int], dice: random.Random) -> set[int]:
    """Sixteen rows; `rooms` falls, and rows with much room are likelier than others."""
    with_room = next((row for row, room in enumerate(rooms) if not room), len(rooms))
    chosen = {row for row in (0, 1) if dice.random() < 0.5 and row < with_room}
    chosen |= {int(dice.random() * with_room) for _ in range(int(dice.random() * 7))}
    while len(chosen) < min(16, len(rooms)):
        chosen.add(int(dice.random() * len(rooms)))
    return chosen


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
