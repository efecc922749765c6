"""Codings: how a tensor becomes few bytes. Each is exact to the bit; the smallest wins.

A coding sees flat unsigned words, whatever they stand for. A word is alive when a bit of it besides the highest is set:
for floats, when the number is not zero. Zeros with a sign (weights multiplied by a mask have them) cost a bit each.

To add one, add a row to CODINGS; its name is what files hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import constriction
import numpy as np
import zstandard

FAST, STEADY, THOROUGH = 1, 9, 15  # zstandard's levels
# A stream longer than _LONG that the first level brings to no less than the share _WORTH is noise without repeats:
# higher levels take a second for each megabyte of that, and find nothing. In others that long the highest finds a
# hundredth more than the one in between, in ten times its time.
_WORTH, _LONG = 0.25, 2**16
_PIECE = 2**22  # words of a tied tensor whose magnitudes are sorted together
_STEPS = 65535  # of the probability that a word is alive
_SAMPLE = 2**16  # words that are looked at for magnitudes that repeat,
_TIED = 0.9  # and the share of different ones among them below which they do


@dataclass(frozen=True)
class Coding:
    """encode: the bytes of a flat array of unsigned words; decode: words back from bytes, their dtype and how many.

    Decoding raises ValueError for bytes that no encoding makes, and never unpacks to more than that many words.
    """

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, np.dtype, int], np.ndarray]


def encode(words: np.ndarray) -> tuple[str, bytes]:
    """The name and the bytes of the coding that is smallest for a flat array of unsigned words.

    >>> encode(np.zeros(1000, np.uint32))[0]
    'gaps'
    """
    alive = _alive(words)
    share = np.count_nonzero(alive) / max(1, words.size)
    sparse = "sparse" if share < 0.9 and len(_bitmap(alive)) < len(_gaps(alive)) else "gaps"  # values cost the same
    fits = {"dense": share >= 0.5, sparse: share < 0.9, "tied": _any_tied(words)}
    return min(((name, CODINGS[name].encode(words)) for name in CODINGS if fits.get(name)), key=lambda m: len(m[1]))


# -- dense: all words, by bytes of one significance ------------------------------------------------


def _zipped(data: bytes) -> bytes:
    fast = zstandard.ZstdCompressor(level=FAST).compress(data)
    if len(data) > _LONG and len(fast) > _WORTH * len(data):
        return fast
    level = STEADY if len(data) > _LONG else THOROUGH
    return min(fast, zstandard.ZstdCompressor(level=level).compress(data), key=len)


def unzipped(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes. The frame's own claim is not believed, so it cannot ask for more memory than that."""
    try:
        unpack = zstandard.ZstdDecompressor(max_window_size=2**27)
        with unpack.stream_reader(data, read_across_frames=True) as stream:
            raw = stream.read(size + 1)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstandard data: {error}") from None
    if len(raw) != size:
        raise ValueError(f"unpacks to another size than the {size} bytes that belong here")
    return raw


def _dense(words: np.ndarray) -> bytes:
    """The words' first bytes, then their second ones and so on, each zipped by itself: exponents lie together, and no
    time is spent on the noise behind them."""
    planes = words.view(np.uint8).reshape(-1, words.itemsize).T
    return b"".join(_zipped(plane.tobytes()) for plane in planes)


def _from_dense(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    raw = unzipped(data, count * dtype.itemsize)
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


# -- sparse: which words are alive, the signs of the others, the words that are alive ---------------


def _alive(words: np.ndarray) -> np.ndarray:
    return (words & ~_sign(words.dtype)) != 0


def _sign(dtype: np.dtype) -> np.unsignedinteger:
    """The word of which only the highest bit is set: a float's minus zero."""
    return dtype.type(1 << (8 * dtype.itemsize - 1))


def _sparse(
    encode_positions: Callable[[np.ndarray], bytes],
    decode_positions: Callable[[bytes, int, int], np.ndarray],
    values: Coding | None = None,
) -> Coding:
    """The coding with these positions: ``encode(alive)``, and ``decode(data, count, living)`` back to `alive`.

    values: how the words that are alive are stored, dense by default.
    """
    values = values or Coding(_dense, _from_dense)

    def encoded(words: np.ndarray) -> bytes:
        alive = _alive(words)
        signs = words[~alive] != 0
        parts = [encode_positions(alive), _zipped(np.packbits(signs).tobytes()) if signs.any() else b""]
        head = np.array([int(alive.sum()), *map(len, parts)], "<u8").tobytes()
        return head + b"".join(parts) + values.encode(words[alive])

    def decoded(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
        if len(data) < 24:
            raise ValueError("too short for a sparse tensor")
        living, first, second = (int(n) for n in np.frombuffer(data[:24], "<u8"))
        if living > count or 24 + first + second > len(data):
            raise ValueError("the header of a sparse tensor cannot be")
        end = 24 + first + second
        positions, signs = data[24 : 24 + first], data[24 + first : end]
        alive = decode_positions(positions, count, living)
        if int(alive.sum()) != living:
            raise ValueError("a sparse tensor's positions and values do not agree")
        out = np.zeros(count, dtype)
        if signs:
            bits = np.frombuffer(unzipped(signs, -(-(count - living) // 8)), np.uint8)
            out[~alive] = np.unpackbits(bits, count=count - living) * _sign(dtype)
        out[alive] = values.decode(data[end:], dtype, living)
        return out

    return Coding(encoded, decoded)


def _bitmap(alive: np.ndarray) -> bytes:
    """One bit a word, range-coded with the share of those that are alive: H(share) bits each, the best if they are
    independent."""
    steps = int(np.clip(round(float(alive.mean()) * _STEPS), 1, _STEPS - 1)) if alive.size else 1
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(alive.astype(np.int32), _model(steps))
    return np.array([steps], "<u4").tobytes() + coder.get_compressed().astype("<u4").tobytes()


def _from_bitmap(data: bytes, count: int, living: int) -> np.ndarray:
    if len(data) < 4 or len(data) % 4:
        raise ValueError("a bitmap of an impossible size")
    steps, *_ = words = np.frombuffer(data, "<u4").astype(np.uint32)
    if not 1 <= steps < _STEPS:
        raise ValueError("a bitmap of an impossible share")
    try:
        decoder = constriction.stream.queue.RangeDecoder(words[1:])
        return decoder.decode(_model(int(steps)), count).astype(bool)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"damaged bitmap: {error}") from None


def _model(steps: int) -> constriction.stream.model.Bernoulli:
    return constriction.stream.model.Bernoulli(steps / _STEPS, perfect=False)


def _gaps(alive: np.ndarray) -> bytes:
    """The distances between words that are alive, as bytes (255: go on), zipped: rows that repeat cost little."""
    gaps = np.diff(np.flatnonzero(alive), prepend=-1) - 1
    counts = gaps // 255 + 1
    stream = np.full(int(counts.sum()), 255, np.uint8)
    stream[np.cumsum(counts) - 1] = gaps % 255
    return np.array([len(stream)], "<u8").tobytes() + _zipped(stream.tobytes())


def _from_gaps(data: bytes, count: int, living: int) -> np.ndarray:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > count // 255 + living:
        raise ValueError("gaps of an impossible size")
    stream = np.frombuffer(unzipped(data[8:], size), np.uint8)
    ends = np.flatnonzero(stream != 255)
    if len(ends) != living or (size and stream[-1] == 255):
        raise ValueError("a sparse tensor's gaps and values do not agree")
    where = np.cumsum(stream, dtype=np.int64)[ends] + np.arange(living)
    if living and where[-1] >= count:
        raise ValueError("a sparse tensor's gaps lead past its end")
    alive = np.zeros(count, bool)
    alive[where] = True
    return alive


# -- tied: blocks of words with one magnitude (unification) ----------------------------------------


def _any_tied(words: np.ndarray) -> bool:
    """Whether magnitudes repeat, to look at the first words that are alive."""
    sample = words[_alive(words)][:_SAMPLE] & ~_sign(words.dtype)
    return len(np.unique(sample)) < _TIED * len(sample)


def _repeats(words: np.ndarray) -> bytes:
    """Signs, the magnitudes in the order in which they first occur, and for every word the step from the number of the
    word before it to its own: 0 within a block's row, 1 at a new block, and the same jump at each block's next row."""
    top = _sign(words.dtype)
    magnitudes = words & ~top
    heads = np.flatnonzero(np.diff(magnitudes, prepend=~magnitudes[:1]))  # of runs: all that must be sorted
    found, first, numbers = np.unique(magnitudes[heads], return_index=True, return_inverse=True)
    order = first.argsort()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    steps = np.zeros(words.size, np.int64)
    steps[heads] = np.diff(rank[numbers.reshape(-1)], prepend=-1)
    jumps = np.where(steps < 0, -2 * steps - 1, 2 * steps).astype("<u4")
    signs = _zipped(np.packbits((words & top) != 0).tobytes())
    parts = [signs, _dense(found[order]), _dense(jumps)]
    return np.array([len(found), *map(len, parts[:2])], "<u8").tobytes() + b"".join(parts)


def _from_repeats(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    if len(data) < 24:
        raise ValueError("too short for a tied tensor")
    kinds, first, second = (int(n) for n in np.frombuffer(data[:24], "<u8"))
    if kinds > count or 24 + first + second > len(data):
        raise ValueError("the header of a tied tensor cannot be")
    signs, table, jumps = data[24 : 24 + first], data[24 + first : 24 + first + second], data[24 + first + second :]
    steps = _from_dense(jumps, np.dtype("<u4"), count).astype(np.int64)
    numbers = np.where(steps % 2, -(steps + 1) // 2, steps // 2).cumsum() - 1
    if count and not 0 <= int(numbers.min()) <= int(numbers.max()) < kinds:
        raise ValueError("a tied tensor's numbers lead outside its table")
    bits = np.unpackbits(np.frombuffer(unzipped(signs, -(-count // 8)), np.uint8), count=count)
    return _from_dense(table, dtype, kinds)[numbers] ^ (bits * _sign(dtype)).astype(dtype)


def _in_pieces(words: np.ndarray) -> bytes:
    """So many words at a time, that a large tensor is sorted in little memory."""
    parts = [_repeats(words[k : k + _PIECE]) for k in range(0, words.size, _PIECE)]
    return np.array([len(part) for part in parts], "<u8").tobytes() + b"".join(parts)


def _from_pieces(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    sizes = np.frombuffer(data[: 8 * -(-count // _PIECE)], "<u8").tolist()
    at, words = 8 * len(sizes), np.empty(count, dtype)
    if 8 * -(-count // _PIECE) != at or at + sum(sizes) != len(data):
        raise ValueError("the pieces of a tied tensor do not fill it")
    for k, size in enumerate(sizes):
        piece = words[k * _PIECE : (k + 1) * _PIECE]
        piece[:] = _from_repeats(data[at : at + size], dtype, piece.size)
        at += size
    return words


def _positions(alive: np.ndarray) -> bytes:
    """The shorter of both ways to say which words are alive."""
    if np.count_nonzero(alive) > 0.99 * alive.size:  # bits: a twelfth a word at most; gaps take 40 bytes of memory each
        return b"\0" + _bitmap(alive)
    return min(b"\0" + _bitmap(alive), b"\1" + _gaps(alive), key=len)


def _from_positions(data: bytes, count: int, living: int) -> np.ndarray:
    if data[:1] not in (b"\0", b"\1"):
        raise ValueError("positions of an unknown kind")
    return (_from_gaps if data[0] else _from_bitmap)(data[1:], count, living)


CODINGS: dict[str, Coding] = {
    "dense": Coding(_dense, _from_dense),
    "sparse": _sparse(_bitmap, _from_bitmap),
    "gaps": _sparse(_gaps, _from_gaps),
    "tied": _sparse(_positions, _from_positions, Coding(_in_pieces, _from_pieces)),
}
