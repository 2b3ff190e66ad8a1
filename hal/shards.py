"""Say which tensor-parallel sizes split a weight between blocks of scales, not through them."""

from __future__ import annotations

__all__ = ["shard_cure", "tensor_parallel_sizes"]


def tensor_parallel_sizes(size: int, block: int) -> tuple[int, ...]:
    """Return the numbers of ranks whose equal shards of `size` are whole blocks, ascending.

    Empty where `size` itself is no multiple of `block`.

    Args:
        size: Rows or columns of the whole weight, at least 1; of gate rows alone, not of both.
        block: Neighbours under one scale, at least 1.
    """
    blocks, rest = divmod(size, block)
    if rest:
        return ()
    return tuple(ranks for ranks in range(1, blocks + 1) if blocks % ranks == 0)


def shard_cure(name: str, block: int, whole: int | None = None) -> str:
    """Return what to do about a shard that is no multiple of `block`, as the cure of an error.

    Args:
        name: What is sharded, such as `intermediate`.
        block: Neighbours under one scale.
        whole: Its size over all ranks; None where nobody knows it.
    """
    if whole is None:
        return f"shard {name} into multiples of {block}"
    if sizes := tensor_parallel_sizes(whole, block):
        return f"of {whole} {name} in all, tensor-parallel sizes {_listed(sizes)} work"
    return f"no tensor-parallel size works: {whole} {name} in all is no multiple of {block}"


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
