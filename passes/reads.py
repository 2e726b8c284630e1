"""What a model does with values of tensors, made static: the answers come from a `Reader`, the rest are ordinary operators.

Before: x_BSC[mask_BS]            (a length that depends on data)
After:  cat([x_BSC[0, :5], x_BSC[1, :3]])   (the mask is asked for once; its answer is part of the program)

Every function here runs twice: while the model is recorded (the reader computes answers) and while it is traced (the reader
repeats them). See `passes/replay.py` for the two readers and `passes/read_guard.py` for what keeps the answers true.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MANY_PIECES = 64  # from here on one gather is better than a concatenation of slices
Run = tuple[int, int, int]


class Reader(Protocol):
    """Answers questions about the content of tensors."""

    replaying: bool

    def ask(self, tensor: Tensor, summarise: Callable[[Tensor], Any]) -> Any:
        """`summarise(tensor on the CPU)`: a Python value."""

    def ask_mask(self, mask: Tensor) -> "Positions":
        """Where a boolean mask is true."""


@dataclass(frozen=True)
class Positions:
    """Where a boolean mask of `dims` dims is true.

    Invariants: `rows` is None for a mask that is true everywhere (whatever its shape), else it has one (row, start, stop) per run
    of true entries in flat order, `row` counting the leading dims flattened; `last` is the size of the last dim.
    """

    dims: int
    rows: tuple[Run, ...] | None
    shape: tuple[int, ...]

    @staticmethod
    def of(mask: Tensor) -> "Positions":
        """The positions of a mask with concrete content."""
        if bool(mask.all()):
            return Positions(mask.dim(), None, tuple(mask.shape))
        flat = mask.reshape(-1, mask.shape[-1]).to(torch.int8)
        edges = torch.nn.functional.pad(flat, (1, 1)).diff(dim=1)
        starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
        runs = tuple((row, start, stop) for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True))
        return Positions(mask.dim(), runs, tuple(mask.shape))

    def columns(self, shape: Sequence[Any]) -> list[list[int]]:
        """One list of coordinates per dim, like `nonzero(as_tuple=True)`; `shape` is the mask's."""
        if self.rows is None:
            flat = list(range(int(torch.Size(shape).numel())))
        else:
            flat = [row * self.shape[-1] + i for row, start, stop in self.rows for i in range(start, stop)]
        found: list[list[int]] = []
        for size in reversed([int(s) for s in shape]):
            found.insert(0, [i % size for i in flat])
            flat = [i // size for i in flat]
        return found


def integers(values: Any, like: Tensor) -> Tensor:
    """A constant int64 tensor on the device of `like`."""
    return torch.tensor(values, dtype=torch.int64, device=like.device)


# ---- single values -------------------------------------------------------------------------------


def scalar(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`bool(t)`, `t.item()`, `t.tolist()` and the like: what `func` says about the content."""
    return reader.ask(args[0], func)


def array(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`t.numpy()`: an array of its own, since writing to it would not reach the tensor."""
    found = reader.ask(args[0], lambda value: value.numpy())
    return found.astype(args[1]) if len(args) > 1 and args[1] is not None else found.copy()


def same(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`torch.equal(a, b)`."""
    if args[0].shape != args[1].shape:
        return False
    return reader.ask((args[0] == args[1]).all(), bool)


def close(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`torch.allclose(a, b, ...)`."""
    return reader.ask(torch.isclose(*args, **kwargs).all(), bool)


def contains(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`element in t`."""
    return reader.ask((args[0] == args[1]).any(), bool)


def scalars_inside(reader: Reader, value: Any) -> Any:
    """`value` with the one-element tensors in it replaced by numbers."""
    if isinstance(value, Tensor):
        return reader.ask(value, Tensor.item) if value.numel() == 1 else value
    if type(value) in (list, tuple):
        return type(value)(scalars_inside(reader, item) for item in value)
    return value


def with_sizes(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Functions that take sizes, lengths or positions as numbers: `torch.zeros(n)`, `x.view(n, -1)`, `x.narrow(0, start, n)`."""
    subject = 1 if args and isinstance(args[0], Tensor) and func not in FACTORIES else 0
    numbers = [scalars_inside(reader, value) for value in args[subject:]]
    return func(*args[:subject], *numbers, **{name: value if name in ("input", "out") else scalars_inside(reader, value) for name, value in kwargs.items()})


def new_tensor(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`torch.tensor([a, b])` of tensors a, b."""
    if args and isinstance(args[0], list | tuple):
        args = (scalars_inside(reader, args[0]), *args[1:])
    return func(*args, **kwargs)


# ---- lengths -------------------------------------------------------------------------------------


def one_hot(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`one_hot(x)` counts the classes itself."""
    classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
    x = args[0] if args else kwargs["tensor"]
    return func(x, reader.ask(x.max(), int) + 1 if classes == -1 else classes)


def bincount(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`bincount(x)`: as long as the largest entry says."""
    x = args[0]
    weights = kwargs.get("weights", args[1] if len(args) > 1 else None)
    least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
    size = max(least, reader.ask(x.max(), int) + 1) if x.numel() else least
    weights = torch.ones_like(x, dtype=torch.int64) if weights is None else weights.to(torch.float64 if weights.dtype != torch.float32 else weights.dtype)
    return torch.zeros(size, dtype=weights.dtype, device=x.device).scatter_add(0, x.long(), weights)


def unique(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`unique`, `unique_consecutive`: constants."""
    x = args[0]
    found = reader.ask(x, lambda value: func(value, *args[1:], **kwargs))
    made = tuple(torch.tensor(part.tolist(), dtype=part.dtype, device=x.device).reshape(part.shape) for part in ((found,) if isinstance(found, Tensor) else found))
    return made[0] if isinstance(found, Tensor) else made


def repeat_interleave(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`x.repeat_interleave(repeats)` with a tensor of repeats: one ordinary repeat per run of equal counts."""
    given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
    x, repeats, dim = given.get("input", given.get("self")), given.get("repeats"), given.get("dim")
    if given.get("output_size") is not None or (repeats is not None and not isinstance(repeats, Tensor)):
        return func(*args, **kwargs)
    if repeats is None:
        x, repeats = torch.arange(x.shape[0], device=x.device), x
    counts = reader.ask(repeats, Tensor.tolist)
    if dim is None:
        x, dim = x.flatten(), 0
    if repeats.numel() == 1:
        return x.repeat_interleave(counts if isinstance(counts, int) else counts[0], dim)
    borders = [0, *(i for i in range(1, len(counts)) if counts[i] != counts[i - 1]), len(counts)]
    if len(borders) > MANY_PIECES:
        return x.index_select(dim, integers([i for i, count in enumerate(counts) for _ in range(count)], x))
    pieces = [x.narrow(dim, a, b - a).repeat_interleave(counts[a], dim) for a, b in zip(borders, borders[1:], strict=False)]
    return torch.cat(pieces, dim)


# ---- masks and indices ---------------------------------------------------------------------------


def nonzero(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`nonzero`, `argwhere`, `where(mask)`: constant coordinates."""
    if func is torch.where and len(args) + len(kwargs) != 1:
        return func(*args, **kwargs)
    mask = args[0] if args else kwargs.get("input", kwargs.get("condition"))
    as_tuple = func is torch.where or kwargs.get("as_tuple", False)
    if mask.dim() == 0:
        return func(reader.ask(mask, lambda value: value.clone()), **{k: v for k, v in kwargs.items() if k == "as_tuple"})
    columns = [integers(column, mask) for column in reader.ask_mask(mask != 0).columns(mask.shape)]
    return tuple(columns) if as_tuple else torch.stack(columns, dim=1)


def masked_select(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`masked_select(x, mask)` = `x[mask]` after broadcasting."""
    x = args[0] if args else kwargs["input"]
    mask = kwargs.get("mask", args[-1])
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return take(x.expand(shape), 0, reader.ask_mask(mask.expand(shape)))


def is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) and value.dim() > 0


def is_whole(value: Any) -> bool:
    return isinstance(value, slice) and value == slice(None)


def index_of(reader: Reader, index: Any) -> tuple[Any, ...]:
    """An index as a tuple, with tensors in slices replaced by numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(
        slice(*(scalars_inside(reader, bound) for bound in (part.start, part.stop, part.step))) if isinstance(part, slice) else part for part in parts
    )


def constant_index(reader: Reader, parts: Sequence[Any]) -> tuple[Any, ...]:
    """The index with each mask replaced by its coordinates."""
    found: list[Any] = []
    for part in parts:
        if is_mask(part):
            found += [integers(column, part) for column in reader.ask_mask(part.bool()).columns(part.shape)]
        else:
            found.append(part)
    return tuple(found)


def mask_place(parts: Sequence[Any], dims: int) -> int | None:
    """The dim where the only mask of an index begins, if the index has only whole slices beside it."""
    masks = [i for i, part in enumerate(parts) if is_mask(part)]
    if len(masks) != 1 or not all(is_mask(part) or part is Ellipsis or is_whole(part) for part in parts):
        return None
    before, after = parts[: masks[0]], parts[masks[0] + 1 :]
    if any(part is Ellipsis for part in before):
        return dims - sum(is_whole(part) for part in after) - parts[masks[0]].dim()
    return len(before)


def get_item(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`x[index]` with masks, or with tensors as bounds of slices."""
    x, parts = args[0], index_of(reader, args[1])
    if not any(is_mask(part) for part in parts):
        return func(x, parts if isinstance(args[1], tuple) else parts[0])
    place = mask_place(parts, x.dim())
    if place is None:
        return func(x, constant_index(reader, parts))
    mask = next(part for part in parts if is_mask(part))
    return take(x, place, reader.ask_mask(mask.bool()))


def set_item(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`x[index] = value` with masks. One value for every place needs no positions."""
    x, value = args[0], args[2]
    parts = index_of(reader, args[1])
    if not any(is_mask(part) for part in parts):
        return func(x, parts if isinstance(args[1], tuple) else parts[0], value)
    if not isinstance(value, Tensor) or value.numel() == 1:
        return func(x, parts if isinstance(args[1], tuple) else parts[0], value)
    place = mask_place(parts, x.dim())
    if place is None:
        return func(x, constant_index(reader, parts), value)
    mask = next(part for part in parts if is_mask(part))
    put(x, place, reader.ask_mask(mask.bool()), value, func)
    return None


def take(x: Tensor, dim: int, at: Positions) -> Tensor:
    """Entries of `x` where a mask over its dims from `dim` on is true.

    Shapes: [*before, *mask dims, *after] -> [*before, n, *after]
    """
    if at.rows is None:
        return x.flatten(dim, dim + at.dims - 1).clone()
    if len(at.rows) > MANY_PIECES:
        flat = [row * at.shape[-1] + i for row, start, stop in at.rows for i in range(start, stop)]
        return x.flatten(dim, dim + at.dims - 1).index_select(dim, integers(flat, x))
    if not at.rows:
        return x.flatten(dim, dim + at.dims - 1).narrow(dim, 0, 0).clone()
    pieces = [part(x, dim, at, run) for run in at.rows]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone()


def part(x: Tensor, dim: int, at: Positions, run: Run) -> Tensor:
    """The view of `x` that one run of true entries covers."""
    row, start, stop = run
    for size, following in zip(at.shape[:-1], range(1, at.dims), strict=True):
        inner = int(torch.Size(at.shape[following:-1]).numel())
        x = x.select(dim, row // inner % size)
    return x.narrow(dim, start, stop - start)


def put(x: Tensor, dim: int, at: Positions, value: Tensor, func: Callable[..., Any]) -> None:
    """Write `value` (broadcast to [*before, n, *after]) to where the mask is true."""
    before, after = x.shape[:dim], x.shape[dim + at.dims :]
    if at.rows is None:
        count = torch.Size(x.shape[dim : dim + at.dims]).numel()
        x.copy_(value.expand(*before, count, *after).reshape(x.shape))
        return
    count = sum(stop - start for _, start, stop in at.rows)
    value = value.expand(*before, count, *after)
    if len(at.rows) > MANY_PIECES:
        columns = tuple(integers(column, x) for column in at.columns(at.shape))
        func(x, (*[slice(None)] * dim, *columns), value)
        return
    done = 0
    for run in at.rows:
        length = run[2] - run[1]
        part(x, dim, at, run).copy_(value.narrow(dim, done, length))
        done += length


def data(reader: Reader, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`t.data`: tracing sees a write through `detach()`, but not through `data`."""
    return args[0].detach() if reader.replaying else func(*args, **kwargs)


FACTORIES = frozenset({torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.eye})
SIZED = (
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, Tensor.repeat, Tensor.narrow, torch.narrow, Tensor.split, torch.split,
    Tensor.unflatten, torch.unflatten, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, torch.nn.functional.pad,
)  # fmt: skip
Handler = Callable[[Reader, Callable[..., Any], Any, Any], Any]
HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__complex__, Tensor.tolist, torch.is_nonzero), scalar),
    **dict.fromkeys((Tensor.numpy, Tensor.__array__), array),
    **dict.fromkeys((torch.equal, Tensor.equal), same),
    **dict.fromkeys((torch.allclose, Tensor.allclose), close),
    **dict.fromkeys((torch.bincount, Tensor.bincount), bincount),
    **dict.fromkeys((torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive), unique),
    **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), repeat_interleave),
    **dict.fromkeys((torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where), nonzero),
    **dict.fromkeys((torch.masked_select, Tensor.masked_select), masked_select),
    **dict.fromkeys((*FACTORIES, *SIZED), with_sizes),
    Tensor.__contains__: contains,
    torch.nn.functional.one_hot: one_hot,
    torch.tensor: new_tensor,
    Tensor.__getitem__: get_item,
    Tensor.__setitem__: set_item,
    Tensor.data.__get__: data,  # type: ignore[attr-defined]
}
