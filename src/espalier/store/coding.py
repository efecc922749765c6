"""Codings: how a tensor becomes few bytes. Each is exact to the bit; the smallest wins.

To add one, add a row to CODINGS; its name is what files hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import constriction
import numpy as np
import zstandard

LEVEL = 15  # zstandard's, between speed and size


@dataclass(frozen=True)
class Coding:
    """encode: the bytes of a flat array of unsigned words; decode: words back from bytes, their dtype and how many."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, np.dtype, int], np.ndarray]


def _shuffled(words: np.ndarray) -> bytes:
    """zstandard over the words' first bytes, then their second ones and so on: exponents lie together."""
    planes = words.view(np.uint8).reshape(-1, words.itemsize).T
    return zstandard.ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(planes).tobytes())


def _unshuffled(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    size = count * dtype.itemsize
    raw = _unzipped(data, size)
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def _unzipped(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes. The frame's own claim is not believed, so it cannot ask for more memory than that."""
    try:
        raw = zstandard.ZstdDecompressor().decompressobj().decompress(data) if size == 0 else _bounded(data, size)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstandard data: {error}") from None
    if len(raw) != size:
        raise ValueError(f"unpacks to another size than the {size} bytes that belong here")
    return raw


def _bounded(data: bytes, size: int) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as stream:
        return stream.read(size + 1)


def _sparse(words: np.ndarray) -> bytes:
    """Which words are not zero, entropy-coded, and after it those that are not, shuffled."""
    alive = words != 0
    values = _shuffled(words[alive])
    share = float(alive.mean()) if alive.size else 0.0
    quantised = int(np.clip(round(share * 65535), 1, 65534))
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(alive.astype(np.int32), _positions(quantised))
    bitmap = coder.get_compressed().astype("<u4").tobytes()
    head = np.array([int(alive.sum()), quantised, len(bitmap)], "<u8").tobytes()
    return head + bitmap + values


def _from_sparse(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    if len(data) < 24:
        raise ValueError("too short for a sparse tensor")
    living, quantised, length = (int(n) for n in np.frombuffer(data[:24], "<u8"))
    if living > count or not 1 <= quantised <= 65534 or length % 4 or length > len(data) - 24:
        raise ValueError("the header of a sparse tensor cannot be")
    words = np.frombuffer(data[24 : 24 + length], "<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    alive = decoder.decode(_positions(quantised), count).astype(bool)
    if int(alive.sum()) != living:
        raise ValueError("a sparse tensor's positions and values do not agree")
    out = np.zeros(count, dtype)
    out[alive] = _unshuffled(data[24 + length :], dtype, living)
    return out


def _positions(quantised: int) -> constriction.stream.model.Bernoulli:
    """The model of positions: each word is alive with the same probability, `quantised` of 65535."""
    return constriction.stream.model.Bernoulli(quantised / 65535, perfect=False)


def _gaps(words: np.ndarray) -> bytes:
    """The distances between words that are not zero, as bytes (255: go on), zipped; then the words."""
    where = np.flatnonzero(words)
    gaps = np.diff(where, prepend=-1) - 1
    counts = gaps // 255 + 1
    stream = np.full(int(counts.sum()), 255, np.uint8)
    stream[np.cumsum(counts) - 1] = gaps % 255
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(stream.tobytes())
    head = np.array([len(where), len(stream), len(packed)], "<u8").tobytes()
    return head + packed + _shuffled(words[where])


def _from_gaps(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    if len(data) < 24:
        raise ValueError("too short for a sparse tensor")
    living, size, length = (int(n) for n in np.frombuffer(data[:24], "<u8"))
    if living > count or size > count + living or length > len(data) - 24:
        raise ValueError("the header of a sparse tensor cannot be")
    stream = np.frombuffer(_unzipped(data[24 : 24 + length], size), np.uint8)
    ends = np.flatnonzero(stream != 255)
    if len(ends) != living or (size and stream[-1] == 255):
        raise ValueError("a sparse tensor's gaps and values do not agree")
    where = (np.cumsum(stream.astype(np.int64))[ends] + np.arange(living)) if living else np.zeros(0, np.int64)
    if living and where[-1] >= count:
        raise ValueError("a sparse tensor's gaps lead past its end")
    out = np.zeros(count, dtype)
    out[where] = _unshuffled(data[24 + length :], dtype, living)
    return out


CODINGS: dict[str, Coding] = {
    "dense": Coding(_shuffled, _unshuffled),
    "sparse": Coding(_sparse, _from_sparse),
    "gaps": Coding(_gaps, _from_gaps),
}


def encode(words: np.ndarray) -> tuple[str, bytes]:
    """The name and the bytes of the coding that is smallest for a flat array of unsigned words."""
    names = list(CODINGS) if np.count_nonzero(words) < 0.9 * words.size else ["dense"]
    return min(((name, CODINGS[name].encode(words)) for name in names), key=lambda made: len(made[1]))
