"""What the schemas of aten ops do not say of their arguments: an index is smaller than the dim, ... By op and argument.

A recipe gets the arguments that were drawn before it, by their names, and may draw others; "*shape" and "*dtype" are
those of a call's first tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

import torch
from strategies import SIZES

from mst_fx.verify.by_chunks import divisors

aten = torch.ops.aten
OMIT = object()
"""An argument that is left out."""


class Draw(Random):
    """A source of arguments; one of the same name draws the same."""

    gradients = True

    def shape(self, least: int = 1, most: int = 4) -> list[int]:
        shape = [self.choice(SIZES) for _ in range(self.randint(least, most))]
        return shape if max(shape, default=2) > 1 else self.shape(least, most)

    def dim(self, shape: list[int]) -> int:
        return self.randrange(-len(shape), len(shape)) if shape else 0

    def dims(self, shape: list[int]) -> list[int]:
        chosen = self.sample(
            range(len(shape)), self.choice((0, min(1, len(shape)), min(1, len(shape)), len(shape) // 2, len(shape)))
        )
        return [dim - self.choice([0, len(shape)]) for dim in chosen]

    def values(self, shape: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Ties are practically impossible among numbers with a fraction."""
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        normal = torch.randn(shape, dtype=torch.float64, generator=generator)
        if dtype == torch.bool:
            return normal > 0
        if dtype.is_floating_point:  # some calls run without a gradient alone
            positive = self.random() < 0.4
            return (normal.abs().clamp(max=0.9) if positive else normal).to(dtype).requires_grad_(self.gradients)
        return (normal * 3).round().to(dtype)

    def indices(self, shape: list[int], below: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        return torch.randint(max(below, 1), shape, generator=generator, dtype=dtype)

    def broadcast(self, shape: list[int]) -> list[int]:
        """A shape that broadcasts to `shape`."""
        kept = shape[self.randint(0, len(shape)) :] if self.random() < 0.3 else shape
        return [self.choice((size, size, size, 1)) for size in kept]

    def view(self, shape: list[int]) -> list[int]:
        """Another shape of as many elements; one size may be left to be found out."""
        factors: list[int] = []
        for size in shape:
            factor = self.choice(divisors(size))
            factors += [factor, size // factor]
        view = [1]
        for factor in factors:
            if self.random() < 0.5:
                view.append(factor)
            else:
                view[-1] *= factor
        assert prod(view) == prod(shape)
        if self.random() < 0.3:
            view[self.randrange(len(view))] = -1
        return view

    def like(self, shape: list[int], dim: int, sizes: tuple[int, ...] = (1, 2, 3)) -> list[int]:
        """The shape with another size along one dim; now and then shorter along the others, too."""
        other = [size if self.random() < 0.85 else self.randint(1, size) for size in shape]
        other[dim] = self.choice(sizes)
        return other


Recipe = dict[str, Callable[[Draw, dict[str, Any]], Any]]


def _self(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    return draw.values(values["*shape"], values["*dtype"])


def _of_shape(make: Callable[[Draw, dict[str, Any]], list[int]]) -> Callable[[Draw, dict[str, Any]], Any]:
    return lambda draw, values: draw.values(make(draw, values))


def _matrices(ranks: int, bias: str | None, left: str, right: str) -> Recipe:
    """[.., n, k] times [.., k, m] and what is added to it."""

    def sizes(draw: Draw, values: dict[str, Any]) -> list[int]:
        return values.setdefault("*sizes", [draw.choice((1, 2, 3, 4)) for _ in range(4)])  # batch, n, k, m

    def pick(*which: int) -> Callable[[Draw, dict[str, Any]], list[int]]:
        return lambda draw, values: [sizes(draw, values)[i] for i in ((0, *which) if ranks == 3 else which)]

    recipe = {left: _of_shape(pick(1, 2)), right: _of_shape(pick(2, 3))}
    return recipe | (
        {bias: _of_shape(lambda draw, values: draw.broadcast(pick(1, 3)(draw, values)))} if bias is not None else {}
    )


def _attention() -> Recipe:
    """Queries, keys and values [B, H, T, D], and a mask of some or all sequences and heads."""

    def sizes(draw: Draw, values: dict[str, Any]) -> list[int]:
        return values.setdefault("*sizes", [draw.choice((1, 2, 3)), draw.choice((1, 2, 4)), 3, 2])

    def mask(draw: Draw, values: dict[str, Any]) -> torch.Tensor | None:
        batch, heads, tokens, _ = sizes(draw, values)
        shape = [draw.choice((1, batch)), draw.choice((1, heads)), tokens, tokens]
        return draw.choice((None, draw.values(shape).detach()))

    of_tokens = dict.fromkeys(("query", "key", "value"), _of_shape(sizes))
    return {**of_tokens, "dropout_p": _numbers(0.0), "is_causal": _numbers(False), "attn_mask": mask}


def _size_of(values: dict[str, Any], name: str = "self") -> list[int]:
    return list(values[name].shape)


def _index_along(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    shape = _size_of(values)
    return draw.indices(draw.like(shape, values["dim"]), shape[values["dim"]])


def _permuted_along(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    """Indices that are unique along the dim: which of two writes wins is nobody's promise."""
    shape = _size_of(values)
    other = draw.like(shape, values["dim"], sizes=(shape[values["dim"]],))
    return draw.values(other).argsort(values["dim"])


def _row_index(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    return draw.indices([draw.randint(1, 4)], _size_of(values)[values["dim"]])


def _unique_rows(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    size = _size_of(values)[values["dim"]]
    return torch.tensor(draw.sample(range(size), draw.randint(1, size)))


def _rows(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    """As many rows along the dim as there are indices."""
    shape = _size_of(values)
    shape[values["dim"]] = values["index"].numel()
    return draw.values(shape, values["self"].dtype)


def _src(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    shape = [size + (draw.random() < 0.15) for size in values["index"].shape]
    return draw.values(shape, values["self"].dtype)


def _indices(draw: Draw, values: dict[str, Any]) -> list[torch.Tensor | None]:
    """For some dims indices that broadcast, for some none; or a mask."""
    shape = _size_of(values)
    picked = [draw.randint(1, 4) for _ in range(draw.randint(1, 2))]
    indices: list[torch.Tensor | None] = []
    for size in shape[: draw.randint(1, len(shape))]:
        index = draw.indices(draw.broadcast(picked), size) - draw.choice((0, 0, size))
        indices.append(draw.choice((index, index, None)))
    if draw.random() < 0.15:
        return [*[None] * (len(shape) - 1), draw.values(shape[-1:], torch.bool)]
    return indices if any(index is not None for index in indices) else [draw.indices(picked, shape[0])]


def _put_values(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    picked = list(aten.index.Tensor(values["self"], values["indices"]).shape)
    return draw.values(draw.broadcast(picked), values["self"].dtype)


def _normalized(draw: Draw, values: dict[str, Any]) -> list[int]:
    return _size_of(values, "input")[draw.randrange(len(values["*shape"])) :]


def _maybe(make: Callable[[Draw, dict[str, Any]], Any]) -> Callable[[Draw, dict[str, Any]], Any]:
    return lambda draw, values: None if draw.random() < 0.3 else make(draw, values)


_weight_of_norm = _maybe(_of_shape(lambda draw, values: values["normalized_shape"]))
_NORM: Recipe = {
    "input": _of_shape(lambda draw, values: values["*shape"]),
    "normalized_shape": _normalized,
    "weight": _weight_of_norm,
    "bias": _weight_of_norm,
    "eps": lambda draw, values: 1e-5,
}


def _scores(rank: tuple[int, ...]) -> Callable[[Draw, dict[str, Any]], torch.Tensor]:
    def scores(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
        shape = [draw.choice((1, 2, 3, 4)) for _ in range(draw.choice(rank))]
        values["*classes"] = shape[1] if len(shape) > 1 else shape[0]
        values["*rows"] = [*shape[:1], *shape[2:]] if len(shape) > 1 else []
        return draw.values(shape)

    return scores


def _target(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    found = draw.indices(values["*rows"], values["*classes"])
    return torch.where(draw.values(values["*rows"]) > 1, -100, found)


def _nll(*rank: int) -> Recipe:
    return {
        "self": _scores(rank),
        "target": _target,
        "weight": _maybe(lambda draw, values: draw.values([values["*classes"]]).abs()),
        "reduction": lambda draw, values: draw.choice((0, 0, 1, 2)),
        "ignore_index": lambda draw, values: draw.choice((-100, -100, 0)),
    }


def _size_list(draw: Draw, values: dict[str, Any]) -> list[int]:
    return draw.shape()


def _expanded(draw: Draw, values: dict[str, Any]) -> list[int]:
    kept = [draw.choice((1, 3)) if size == 1 else draw.choice((size, -1)) for size in _size_of(values)]
    return [draw.randint(1, 3) for _ in range(draw.choice((0, 0, 1, 2)))] + kept


def _sections(draw: Draw, values: dict[str, Any]) -> list[int]:
    dim = values["dim"] = draw.dim(values["*shape"])
    cut = draw.randint(0, values["*shape"][dim])
    return [cut, values["*shape"][dim] - cut]


def _position(draw: Draw, values: dict[str, Any]) -> int | None:
    return draw.choice((None, *range(-4, 7)))


def _part(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    """A slice of the shape of the value, and where it lies."""
    shape = _size_of(values)
    values["dim"] = draw.dim(shape)
    values["start"], values["end"] = _position(draw, values), _position(draw, values)
    values["step"] = draw.randint(1, 2)
    args = [values[name] for name in ("dim", "start", "end", "step")]
    return draw.values(list(aten.slice.Tensor(torch.empty(shape), *args).shape), values["self"].dtype)


def _picked(draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    """The value without one dim."""
    shape = _size_of(values)
    values["dim"] = draw.dim(shape)
    del shape[values["dim"]]
    return draw.values(shape, values["self"].dtype)


def _parts(stacked: bool) -> Callable[[Draw, dict[str, Any]], list[torch.Tensor]]:
    def parts(draw: Draw, values: dict[str, Any]) -> list[torch.Tensor]:
        shape = values["*shape"]
        values["dim"] = draw.dim([*shape, 1] if stacked else shape)
        shapes = [list(shape) for _ in range(draw.randint(1, 3))]
        for other in shapes:
            if not stacked:
                other[values["dim"]] = draw.choice(SIZES)
        return [draw.values(other, values["*dtype"]) for other in shapes]

    return parts


def _dim(draw: Draw, values: dict[str, Any]) -> int:
    """Also of a value that was drawn before."""
    return values["dim"] if "dim" in values else draw.dim(values["*shape"])


def _of_dim(most: int) -> Callable[[Draw, dict[str, Any]], int]:
    return lambda draw, values: draw.randint(1, most)


def _numbers(*choices: Any) -> Callable[[Draw, dict[str, Any]], Any]:
    return lambda draw, values: draw.choice(choices)


def _drawn_dims(draw: Draw, values: dict[str, Any]) -> list[int]:
    return values.setdefault("dims", draw.dims(values["*shape"]))


def _pads(dims: int | None) -> Callable[[Draw, dict[str, Any]], list[int]]:
    """Negative ones cut."""
    least = -1 if dims is None else 0
    return lambda draw, values: [
        draw.choice((0, 0, least, 1)) for _ in range(2 * (dims or draw.randint(0, len(values["*shape"]))))
    ]


def _rows_of_searched(draw: Draw, values: dict[str, Any]) -> list[int]:
    return draw.choice(([5], [*values["*shape"][:-1], 5]))


_GATHERED: Recipe = {"dim": _dim, "index": _index_along}
_SIZE: Recipe = {"size": _size_list}
_VIEW: Recipe = {"size": lambda draw, values: draw.view(values["*shape"])}
_VIEW_REPEAT: Recipe = {
    "repeats": lambda draw, values: [draw.randint(1, 3) for _ in range(len(values["*shape"]) + draw.choice((0, 0, 1)))],
}
_WINDOWS: Recipe = {
    "kernel_size": lambda draw, values: [draw.randint(1, 2) for _ in range(2)],
    "stride": _numbers([], [1, 1], [2, 1]),
    "padding": _numbers([0, 0], [1, 0]),
    "dilation": _numbers([1, 1]),
}
_POOLED_TO: Recipe = {"output_size": lambda draw, values: [draw.randint(1, 2) for _ in range(2)]}
_TRANSPOSED: Recipe = {"dim0": lambda d, v: d.dim(v["*shape"]), "dim1": lambda d, v: d.dim(v["*shape"])}

RECIPES: dict[Any, Recipe] = {
    aten.mm.default: _matrices(2, None, "self", "mat2"),
    aten.addmm.default: _matrices(2, "self", "mat1", "mat2"),
    aten.bmm.default: _matrices(3, None, "self", "mat2"),
    aten.baddbmm.default: _matrices(3, "self", "batch1", "batch2"),
    aten.gather.default: _GATHERED,
    aten.index_select.default: {"dim": _dim, "index": _row_index},
    aten.index.Tensor: {"indices": _indices},
    aten.index_put.default: {"indices": _indices, "values": _put_values},
    aten.index_add.default: {"dim": _dim, "index": _row_index, "source": _rows},
    aten.scatter.src: {"dim": _dim, "index": _permuted_along, "src": _src},
    aten.scatter.value: {"dim": _dim, "index": _index_along},
    aten.scatter.reduce: {**_GATHERED, "src": _src, "reduce": _numbers("add", "multiply")},
    aten.scatter.value_reduce: {**_GATHERED, "reduce": _numbers("add", "multiply")},
    aten.scatter_add.default: {**_GATHERED, "src": _src},
    aten.scatter_reduce.two: {**_GATHERED, "src": _src},
    aten.index_copy.default: {"dim": _dim, "index": _unique_rows, "source": _rows},
    aten.index_reduce.default: {
        "dim": _dim,
        "index": _row_index,
        "source": _rows,
        "reduce": _numbers("prod", "mean", "amax", "amin"),
    },
    aten.index_fill.int_Scalar: {"dim": _dim, "index": _row_index},
    aten.aminmax.default: {"dim": _dim},
    aten.flip.default: {"dims": lambda draw, values: draw.dims(values["*shape"])},
    aten.rot90.default: {"dims": lambda draw, values: draw.sample(range(-1, len(values["*shape"])), 2)},
    aten.roll.default: {
        "dims": lambda draw, values: draw.dims(values["*shape"]),
        "shifts": lambda draw, values: [draw.choice((-1, 1, 2)) for _ in _drawn_dims(draw, values) or [0]],
    },
    aten.unfold.default: {"dimension": lambda draw, values: draw.dim(values["*shape"]), "size": _of_dim(3)},
    aten.constant_pad_nd.default: {"pad": _pads(None)},
    aten.reflection_pad1d.default: {"padding": _pads(1)},
    aten.replication_pad1d.default: {"padding": _pads(1)},
    aten.reflection_pad2d.default: {"padding": _pads(2)},
    aten.replication_pad2d.default: {"padding": _pads(2)},
    aten.avg_pool2d.default: _WINDOWS,
    aten.max_pool2d_with_indices.default: _WINDOWS,
    aten._adaptive_avg_pool2d.default: _POOLED_TO,
    aten.adaptive_max_pool2d.default: _POOLED_TO,
    aten.pixel_shuffle.default: {
        "self": lambda draw, values: draw.values([*draw.shape(1, 2), 4, *draw.shape(2, 2)]),
        "upscale_factor": _numbers(1, 2),
    },
    aten.channel_shuffle.default: {
        "self": lambda draw, values: draw.values([draw.choice(SIZES), 6, *draw.shape(1, 2)]),
        "groups": _numbers(1, 2, 3),
    },
    aten.avg_pool3d.default: {
        "self": lambda draw, values: draw.values([*draw.shape(1, 2), 2, 3, 2]),
        "kernel_size": _numbers([1, 2, 1], [2, 1, 2]),
        "stride": _numbers([], [1, 1, 1]),
        "padding": _numbers([0, 0, 0]),
    },
    aten._adaptive_avg_pool3d.default: {
        "self": lambda draw, values: draw.values([*draw.shape(1, 2), 2, 3, 2]),
        "output_size": _numbers([1, 2, 1], [2, 1, 2]),
    },
    aten.diagonal.default: {"dim1": lambda d, v: d.dim(v["*shape"]), "dim2": lambda d, v: d.dim(v["*shape"])},
    aten.native_group_norm.default: {
        "input": lambda draw, values: draw.values([draw.randint(2, 4), 4, *draw.shape(1, 2)]),
        "weight": _maybe(lambda draw, values: draw.values([4])),
        "bias": _maybe(lambda draw, values: draw.values([4])),
        "N": lambda draw, values: values["input"].shape[0],
        "C": lambda draw, values: 4,
        "HxW": lambda draw, values: values["input"][0, 0].numel(),
        "group": _numbers(1, 2, 4),
        "eps": _numbers(1e-5),
    },
    aten.norm.Scalar: {"p": _numbers(1, 2, 3)},
    aten.norm.ScalarOpt_dim: {"p": _numbers(None, 1, 2, 3)},
    aten.pixel_unshuffle.default: {"downscale_factor": _numbers(1, 2, 3)},
    aten.bucketize.Tensor: {"boundaries": lambda draw, values: draw.values([4]).sort()[0]},
    aten.isin.Tensor_Tensor: {"test_elements": lambda draw, values: draw.values([2, 2], values["elements"].dtype)},
    aten.searchsorted.Tensor: {
        "sorted_sequence": lambda draw, values: draw.values(_rows_of_searched(draw, values)).sort()[0],
        "self": lambda draw, values: draw.values(values["*shape"]),
        "sorter": lambda draw, values: draw.choice((None, values["sorted_sequence"].argsort(-1))),
    },
    aten.any.dims: {"dim": lambda draw, values: draw.dims(values["*shape"])},
    aten.all.dims: {"dim": lambda draw, values: draw.dims(values["*shape"])},
    aten.kthvalue.default: {"k": _of_dim(3)},
    aten.embedding.default: {
        "weight": lambda draw, values: draw.values([draw.randint(2, 6), 3]),
        "indices": lambda draw, values: draw.indices(values["*shape"], len(values["weight"])),
        "padding_idx": _numbers(-1, 0, 1, OMIT),
        "sparse": _numbers(False, OMIT),
    },
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(),
    aten.nll_loss_forward.default: _nll(1, 2, 2, 2),
    aten.nll_loss2d_forward.default: _nll(4),
    aten.native_layer_norm.default: _NORM,
    aten.topk.default: {"k": _of_dim(3)},
    aten.histc.default: {
        "self": lambda draw, values: draw.values([draw.choice((3, 4, 6))] if draw.random() < 0.7 else values["*shape"]),
        "bins": _of_dim(5),
    },
    aten.view.default: _VIEW,
    aten._unsafe_view.default: _VIEW,
    aten.reshape.default: {"shape": lambda draw, values: draw.view(_size_of(values))},
    aten.unsqueeze.default: {"dim": lambda draw, values: draw.dim([*values["*shape"], 1])},
    aten.t.default: {"self": lambda draw, values: draw.values(values["*shape"][:2])},
    aten.transpose.int: _TRANSPOSED,
    aten.permute.default: {
        "dims": lambda draw, values: [
            dim - draw.choice((0, len(values["*shape"])))
            for dim in draw.sample(range(len(values["*shape"])), len(values["*shape"]))
        ],
    },
    aten.expand.default: {"size": _expanded},
    aten.repeat.default: _VIEW_REPEAT,
    aten.slice.Tensor: {"start": _position, "end": _position, "step": _of_dim(2)},
    aten.split.Tensor: {"split_size": _of_dim(3)},
    aten.split_with_sizes.default: {"split_sizes": _sections, "dim": _dim},
    aten.select.int: {"index": _numbers(0, 1, -1, -2)},
    aten.slice_scatter.default: {"src": _part},
    aten.select_scatter.default: {"src": _picked, "index": _numbers(0, 1, -1, -2)},
    aten.cat.default: {"tensors": _parts(stacked=False), "dim": _dim},
    aten.stack.default: {"tensors": _parts(stacked=True), "dim": _dim},
    aten.fill.Tensor: {"value": lambda draw, values: draw.values([])},
    aten.arange.default: {"end": _numbers(2, 3, 4, 6)},
    aten.arange.start: {"start": _numbers(0, 1, -2), "end": _numbers(3, 4, 6)},
    aten.arange.start_step: {"start": _numbers(0, 1, -2), "end": _numbers(3, 4, 6), "step": _numbers(1, 2, OMIT)},
    aten.randint.low: {"low": _numbers(0, 1), "high": _numbers(4, 9), "size": _size_list},
    aten.full.default: _SIZE,
    aten.zeros.default: _SIZE,
    aten.ones.default: _SIZE,
    aten.new_zeros.default: _SIZE,
    aten.new_ones.default: _SIZE,
    aten.new_full.default: _SIZE,
}
