"""Look up tiles that were measured: those of this machine's user first, then those shipped.

Both are runs of a table like `configs/measured.json`, whose `tiles` are rows

    [op, scheme, {"kind", "n", "k", "rows", "matrices"}, {tile}, us, default_us]

for an `arch` and a `device`, measured with the `software` named beside them. The user's table is
`measured.json` in the cache folder (`HAL_CACHE`), where `hal tune` puts it; all ranks of a job
should see one folder. A row counts for the same op, scheme, kind and architecture, and for sizes
near its own: within a factor of two of rows and of four of the others together. A tile that this
device's shared memory cannot hold, or that the sizes do not take, is passed over.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.config import cache_folder
from hal.ops.tiles import Tile

if TYPE_CHECKING:
    from hal.device import DeviceSpec

__all__ = [
    "BIND_HOOKS",
    "ProductSizes",
    "StaleTilesWarning",
    "TunedTile",
    "as_row",
    "find_tile",
    "fits",
    "ignoring_tables",
    "nearest",
    "read_tiles",
    "user_table",
]

logger = logging.getLogger("hal")
FARTHEST_ROWS, FARTHEST = 1.0, 2.0
"""In powers of two."""
OTHER_DEVICE = 0.5
SHIPPED = Path(__file__).with_name("configs") / "measured.json"

BIND_HOOKS: list[Callable[[Any], None]] = []
"""Called with each `TileChoice` that a binder makes; `hal tune` looks here for what it may set."""
_ignoring: ContextVar[bool] = ContextVar("hal_ignoring_tiles", default=False)
_warned: set[str] = set()


class StaleTilesWarning(UserWarning):
    """Tell that tiles were measured with another Triton than the one that is here."""


@dataclass(frozen=True, slots=True)
class ProductSizes:
    """One product of an op, as tiles are chosen for it.

    Attributes:
        kind: What `hal.ops.tiles` calls the product.
        n: Rows of a weight matrix.
        k: Its columns.
        rows: Rows of x a matrix, rounded up to a power of two.
        matrices: Matrices that are multiplied at once, rounded up to a power of two.
    """

    kind: str
    n: int
    k: int
    rows: int
    matrices: int = 1

    def distance(self, other: ProductSizes) -> float | None:
        """Return how far another product is, in powers of two; None where no tile carries over."""
        if self.kind != other.kind or bool(self.k % 16) != bool(other.k % 16):
            return None
        far = _powers(self.rows, other.rows)
        if far > FARTHEST_ROWS:
            return None
        far += _powers(self.n, other.n) + _powers(self.k, other.k)
        far += 0.5 * _powers(self.matrices, other.matrices)
        return far if far <= FARTHEST else None


def _powers(one: int, other: int) -> float:
    return abs(math.log2(max(one, 1) / max(other, 1)))


@dataclass(frozen=True, slots=True)
class TunedTile:
    """One measured tile.

    Attributes:
        op: Name of the op.
        scheme: Name of the scheme.
        arch: Architecture that it was measured on.
        device: Key of the device.
        sizes: The product.
        tile: The best tile.
        us: Time of the op with it, in microseconds.
        default_us: Time with the tile that rules give.
        triton: Version that it was measured with.
        source: Where it comes from, for people.
    """

    op: str
    scheme: str
    arch: str
    device: str
    sizes: ProductSizes
    tile: Tile
    us: float
    default_us: float
    triton: str
    source: str


def user_table() -> Path:
    """Return the file of the user's table; it need not exist."""
    return cache_folder() / "measured.json"


def read_tiles(path: Path) -> tuple[TunedTile, ...]:
    """Return the tiles of a table; none where there is no file.

    Raises:
        ValueError: If the file is no such table.
    """
    try:
        stamp = path.stat()
    except OSError:
        return ()
    return _read(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _time: int, _size: int) -> tuple[TunedTile, ...]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            TunedTile(
                op,
                scheme,
                run["arch"],
                run.get("device", ""),
                ProductSizes(**sizes),
                Tile(**tile),
                float(us),
                float(default_us),
                run.get("software", {}).get("triton") or "",
                run["source"],
            )
            for run in table["runs"]
            for op, scheme, sizes, tile, us, default_us in run.get("tiles", ())
        )
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tiles: {type(error).__name__}: {error}") from None


def find_tile(
    op: str, scheme: str, spec: DeviceSpec, sizes: ProductSizes, block_m: int = 0
) -> Tile | None:
    """Return the measured tile of the nearest product, or None where none is near enough.

    Args:
        op: Name of the op.
        scheme: Name of the scheme.
        spec: Facts of the device.
        sizes: The product.
        block_m: Rows that the tile must have; 0 leaves them free.
    """
    if _ignoring.get():
        return None
    for path, shipped in ((user_table(), False), (SHIPPED, True)):
        try:
            tiles = read_tiles(path)
        except ValueError as error:
            _warn(f"{error}; it is ignored: run `hal tune` again, or delete it", str(path))
            continue
        found = nearest(tiles, op, scheme, spec, sizes, block_m)
        if found is not None:
            _tell_if_stale(found, spec, shipped)
            return found.tile
    return None


def nearest(
    tiles: tuple[TunedTile, ...],
    op: str,
    scheme: str,
    spec: DeviceSpec,
    sizes: ProductSizes,
    block_m: int = 0,
) -> TunedTile | None:
    """Return the row of the nearest product whose tile fits; of equals the later one."""
    best, least = None, math.inf
    for one in tiles:
        if (one.op, one.scheme, one.arch) != (op, scheme, spec.arch.name):
            continue
        if block_m and one.tile.block_m != block_m:
            continue
        far = sizes.distance(one.sizes)
        if far is None or not fits(one.tile, sizes, spec):
            continue
        far += 0.0 if one.device == spec.key else OTHER_DEVICE
        if far <= least:
            best, least = one, far
    return best


def fits(tile: Tile, sizes: ProductSizes, spec: DeviceSpec) -> bool:
    """Tell whether a tile suits the sizes and this device's shared memory."""
    platform = spec.platform
    limit = spec.shared_memory_bytes or 0
    small = tile.block_n > max(sizes.n, 32) or tile.block_k > max(sizes.k, 32)
    split = tile.split_k > 1 and (sizes.matrices > 1 or sizes.k // tile.split_k < tile.block_k)
    needed = tile.shared_memory_bytes(sizes.kind, platform=platform)
    return not small and not split and needed <= limit


def _tell_if_stale(found: TunedTile, spec: DeviceSpec, shipped: bool) -> None:
    here = spec.software.triton or ""
    if not found.triton or _release(found.triton) == _release(here):
        return
    told = (
        f"tiles of {found.op} {found.scheme} were measured with Triton {found.triton}, and here is "
        f"{here or 'none'} ({found.source}); run `hal tune` again"
    )
    if shipped:
        logger.info(told)
    else:
        _warn(told, f"{found.triton} {here}")


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _warn(text: str, key: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, StaleTilesWarning, stacklevel=4)


@contextmanager
def ignoring_tables() -> Iterator[None]:
    """Take the rules' tiles alone inside, as `hal tune` does to know what it improves on."""
    token = _ignoring.set(True)
    try:
        yield
    finally:
        _ignoring.reset(token)


def as_row(one: TunedTile) -> list[Any]:
    """Return a row of a table's `tiles`."""
    return [one.op, one.scheme, asdict(one.sizes), asdict(one.tile), one.us, one.default_us]
