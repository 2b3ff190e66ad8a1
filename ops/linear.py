"""Multiply by a (quantized) weight: y = x @ weight.T + bias.

    bf16:          y = x @ w.T
    fp8_channel:   y[m, n] = sx[m] * sw[n] * sum_k qx[m, k] * qw[n, k]
    int8_channel:  the same with int8 codes and an int32 sum
    int8_channel_asymmetric, int8_static_asymmetric:
        sx[m] * sw[n] * (sum_k qx[m, k] * qw[n, k] - zx[m] * sum_k qw[n, k])
    int8_weight_zeros:  sx[m] * sw[n] * (sum_k qx[m, k] * qw[n, k] - zw[n] * sum_k qx[m, k])
    fp8_block128:  y[m, n] = sum_g sx[m, g] * sw[n // 128, g] * sum_{k in g} qx[m, k] * qw[n, k]

`x` is `[..., K]` bf16 or fp16, the weight `[N, K]`; activations are quantized at each call as the
scheme says. Kernels of level `weight_only` and `dequant` leave them as they are, which is more
precise than the scheme asks for. Static schemes quantize under the `input_scale` of the weight.

This file is longer than others: evidence is about functions by their module (`hal.sources`), so
that what ran on devices would be of an earlier source if binders, or what they share, moved.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hal.needs import Needs
from hal.ops.binding import TRITON_HERE, Binding, Launch, Tensors, measurements
from hal.ops.checks import ACTIVATION_DTYPES
from hal.ops.quantize import fake_quantize
from hal.ops.shards import why_cut
from hal.ops.triton_since import needs_triton
from hal.quant.scheme import SCHEMES
from hal.registry import Level, Op

if TYPE_CHECKING:
    import torch

    from hal.ops.tiles import Tile
    from hal.quant.scheme import Scheme
    from hal.quant.tensor import QTensor

__all__ = ["LINEAR", "bind_reference", "linear"]

LINEAR = Op(
    "linear",
    (
        *("tokens", "in_features", "out_features", "in_features_ranks", "out_features_ranks"),
        *("dtype", "bias"),
    ),
    "multiply by a weight matrix",
    measurements("linear"),
    choices={"dtype": ACTIVATION_DTYPES, "bias": (True, False)},
    refused=partial(why_cut, in_features=("columns",), out_features=("rows",)),
)
QUANTIZED = tuple(name for name in SCHEMES if name != "bf16")
ALL = {name: scheme.operands() for name, scheme in SCHEMES.items()}
WEIGHT_ONLY = {name: SCHEMES[name].operands(weight_only=True) for name in QUANTIZED}
E5M2 = {name: how for name, how in WEIGHT_ONLY.items() if SCHEMES[name].weight.format == "e5m2"}
BYTEWISE = {
    name: how
    for name, how in WEIGHT_ONLY.items()
    if SCHEMES[name].weight.bytewise and SCHEMES[name].weight.symmetric
}
FLOAT_BYTES = {
    name: how for name, how in BYTEWISE.items() if SCHEMES[name].weight.scale_format == "float32"
}
"""Those whose scales libraries can read."""
SHIFTED = {name: how for name, how in WEIGHT_ONLY.items() if not SCHEMES[name].weight.symmetric}
"""Schemes whose channels have zero points."""
PACKED = {
    name: how for name, how in WEIGHT_ONLY.items() if name not in {**BYTEWISE, **E5M2, **SHIFTED}
}
W4A8 = "int4_w4a8_fp8"
FP8 = (
    *("fp8_tensor", "fp8_channel", "fp8_block128", "fp8_block128_ue8m0"),
    *("fp8_static", "fp8_static_channel"),
)
INT8 = ("int8_channel", "int8_static")
"""Schemes of int8 whose products are a sum and scales, without zero points."""
INT8_SHIFTED = ("int8_channel_asymmetric", "int8_static_asymmetric", "int8_weight_zeros")
"""Those with zero points on one side: of each row, of all rows, or of each channel."""
NVFP4 = ("nvfp4", "nvfp4_static")
"""Schemes of e2m1 on both sides, which differ in where the second scale of rows comes from."""
INT4 = {name: how for name, how in WEIGHT_ONLY.items() if name.startswith("int4_w4a16")}
ANYWHERE = (Needs.platform("cpu", "cuda", "rocm", "xpu"), Needs.package("torch"))
TRITON = (TRITON_HERE, needs_triton())
QUANTIZED_ROWS = Needs.between("in_features", 1, 32768, "rows are quantized in one piece")

Bound = tuple[Launch, Tensors]


def linear(
    x: torch.Tensor,
    weight: QTensor | torch.Tensor,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return `x @ weight.T + bias`; binds the weight on first use and keeps the binding.

    Args:
        x: `[..., K]` bf16 or fp16.
        weight: `[N, K]` QTensor, or a tensor for scheme `bf16`.
        bias: `[N]` or None.
        **options: `platform`, `force`, `minimum`, ... as for `hal.ops.Linear`.

    Raises:
        ArgumentError: For a wrong shape, dtype or device.
        NoKernelError: If no kernel can run.
    """
    from hal.ops.cache import bound_linear

    bound = bound_linear(weight, bias, x.dtype, **options)
    result: torch.Tensor = bound(x)
    return result


@LINEAR.kernel(
    "reference",
    level=Level.REFERENCE,
    band="reference",
    signatures=ALL,
    requires=(Needs.package("torch"),),
    batch_invariant=True,
)
def bind_reference(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Represent both operands as the scheme does and multiply in float32."""
    scheme, encoding, shape = weight.scheme, weight.encoding, weight.shape
    width = len(weight.tensors)
    single = binding.selection.options.batch_invariant

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows = x.reshape(-1, shape[-1])
        seen = weight.with_tensors(tensors[:width])
        wide = seen.dequantize()
        fixed = (*fixed_scale(seen), None)[0]
        out = multiply(fake_quantize(rows, scheme, encoding, fixed), wide, single)
        if bias is not None:
            out = out + tensors[-1].float()
        return out.to(x.dtype)

    return launch, _with_bias(weight.tensors, bias)


def multiply(rows: torch.Tensor, weight: torch.Tensor, single: bool) -> torch.Tensor:
    """Return `rows @ weight.T`, row by row if `single`: libraries sum one row in another order."""
    import torch

    if not single:
        return rows @ weight.T
    return torch.cat([row @ weight.T for row in rows.split(1)])


@LINEAR.kernel(
    "torch_dense",
    level=Level.NATIVE,
    band="portable",
    signatures={"bf16": ALL["bf16"]},
    requires=(*ANYWHERE, Needs.math_of("dtype")),
)
def bind_dense(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call torch's own bf16 or fp16 matrix product."""
    from torch.nn.functional import linear as dense

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return dense(x, *tensors)

    return launch, _with_bias((weight.values,), bias)


@LINEAR.kernel(
    "torch_dense_emulated",
    level=Level.EMULATED,
    band="portable",
    signatures={"bf16": ALL["bf16"]},
    requires=(*ANYWHERE, Needs.math_of("dtype", "emulated")),
)
def bind_dense_emulated(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Call the product that the device has for a dtype: in float32 on CPUs that only convert it."""
    return _bind_product(binding, weight.values, bias)


def _bind_product(binding: Binding, weight: torch.Tensor, bias: torch.Tensor | None) -> Bound:
    from hal.torch_compat import dense_function

    dense = dense_function(binding.spec, binding.problem("dtype", "bfloat16"))

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return dense(x, *tensors)

    return launch, _with_bias((weight,), bias)


@LINEAR.kernel(
    "torch_dequant",
    level=Level.DEQUANT,
    band="portable",
    signatures=WEIGHT_ONLY,
    requires=(*ANYWHERE, Needs.math_of("dtype", "native", "emulated")),
)
def bind_dequant(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Expand the weight when it is bound; takes the memory of bf16."""
    return _bind_product(binding, weight.dequantize(_dtype(binding)), bias)


@LINEAR.kernel(
    "triton",
    level=Level.NATIVE,
    band="tuned",
    signatures={"bf16": ALL["bf16"]},
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_bf16(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Multiply bf16 or fp16 in Triton."""
    return _bind_decoded(binding, weight, bias, "bf16", weight.tensors)


@LINEAR.kernel(
    "triton_fp8",
    level=Level.NATIVE,
    band="tuned",
    signatures={name: ALL[name] for name in FP8},
    requires=(*TRITON, Needs.triton_math("e4m3fn", "e4m3fnuz"), QUANTIZED_ROWS),
)
def bind_triton_fp8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and multiply 8-bit floats in Triton."""
    return _bind_triton(binding, weight, bias, own_kind(weight.scheme), own_scales(weight))


@LINEAR.kernel(
    "triton_int8",
    level=Level.NATIVE,
    band="tuned",
    signatures={name: ALL[name] for name in (*INT8, *INT8_SHIFTED)},
    requires=(*TRITON, Needs.triton_math("int8"), QUANTIZED_ROWS),
)
def bind_triton_int8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input and multiply int8 in Triton."""
    return _bind_triton(binding, weight, bias, "int8_channel")


@LINEAR.kernel(
    "triton_decode",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures={**BYTEWISE, **E5M2, **SHIFTED},
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_decode(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Decode weight bytes in the loop by integer shifts; needs no fp8 in hardware."""
    if weight.zeros is not None:
        return _bind_shifted(binding, weight, bias)
    kind = product_kind(weight.scheme) + "_decode"
    return _bind_decoded(binding, weight, bias, kind, row_scales(weight))


def _bind_shifted(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Multiply by codes, and take what zero points add from the float32 sums: z[n] * sum_k x[k].

    One row is multiplied by codes less their zero points; few rows take two launches, a tile takes
    off the shift itself.

    A row with an infinity becomes NaN where the product with the weight may be an infinity, unless
    it is the only one.
    """
    import torch

    from hal.ops.decoded import few_products
    from hal.ops.kernels.gemv import gemv
    from hal.ops.kernels.kinds import as_weight
    from hal.ops.kernels.linear import gemm
    from hal.ops.kernels.shift import shift_rows
    from hal.ops.tiles import gemv_tile

    assert weight.zeros is not None
    assert weight.scales is not None
    kind = product_kind(weight.scheme) + "_decode"
    tiles = TileChoice(binding, kind, *weight.shape)
    few, multiply_few = few_products(binding, kind, weight.shape)
    (rows_out, columns), has_bias = weight.shape, bias is not None
    row_tile = gemv_tile(kind, rows_out, columns)

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        codes, scales, sums, zeros = tensors[:4]
        bias = tensors[-1] if has_bias else None
        out = x.new_empty(x.shape[0], rows_out)
        if x.shape[0] == 1:
            held = as_weight(kind, columns, codes, scales)._replace(zeros=zeros)
            gemv(x, held, out, bias=bias, kind=kind, tile=row_tile)
            return out
        if x.shape[0] <= few:
            product = torch.empty_like(out, dtype=torch.float32)
            if multiply_few(x, as_weight(kind, columns, codes, scales), product, None):
                shift_rows(product, x, sums, out, bias)
                return out
        gemm(
            x,
            codes,
            out,
            b_scales=scales,
            bias=bias,
            a_shifts=x.sum(-1, dtype=torch.float32),
            b_sums=sums,
            kind=kind,
            tile=tiles(x.shape[0]),
        )
        return out

    read = weight.values, weight.scales, weight.zeros * weight.scales, weight.zeros
    return launch, _with_bias(read, bias)


def product_kind(scheme: Scheme) -> str:
    """Return what Triton's kernels call the product of a scheme whose codes are bytes."""
    how = scheme.weight
    if how.format == "int8":
        return "int8_channel"
    if how.format == "e5m2":
        return "fp8_e5m2"
    return "fp8_block128" if how.granularity == "block128" else "fp8_channel"


def own_kind(scheme: Scheme) -> str:
    """Return the same of a product in the scheme's own formats, those of the scales included."""
    exponents = scheme.weight.scale_format == "e8m0"
    return f"{product_kind(scheme)}_ue8m0" if exponents else product_kind(scheme)


def encoding_of_rows(binding: Binding, weight: QTensor) -> str:
    """Return the encoding that activations take beside a weight: its own, or the device's fp8."""
    if weight.encoding == "int4":
        return binding.spec.formats.fp8_encoding or "e4m3fn"
    return weight.encoding


def row_scales(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return codes and float32 scales, `[..., N]` of them where the weight has one a matrix."""
    if weight.scheme.weight.scale_format == "e8m0" and weight.scales is not None:
        from hal.quant.mx import decode_e8m0

        return weight.values, decode_e8m0(weight.scales)
    if weight.scheme.weight.granularity != "tensor" or weight.scales is None:
        return weight.tensors[:2]
    scales = weight.scales.unsqueeze(-1).expand(weight.shape[:-1]).contiguous()
    return weight.values, scales


def own_scales(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return codes and scales of a product of `own_kind`: exponents stay bytes."""
    return weight.tensors if weight.scheme.weight.scale_format == "e8m0" else row_scales(weight)


def fixed_scale(weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return what is fixed of static activations, as `represent` takes it; nothing for others.

    That is their scale, float32 `[]`, or scale and zero point, `[2]`. All experts read one input,
    which is quantized once: the largest of their scales, or the widest range, serves all.
    """
    import torch

    if not weight.scheme.static:
        return ()
    assert weight.input_scale is not None
    if weight.input_zero is None:
        return (weight.input_scale.amax(),)
    from hal.quant.asymmetric import widest

    return (torch.stack(widest(weight.input_scale, weight.input_zero)),)


def column_sums(weight: QTensor) -> torch.Tensor:
    """Return the sum of each channel's codes, int32 `[..., N]`: what a zero point multiplies."""
    import torch

    return weight.values.sum(-1, dtype=torch.int32)


@LINEAR.kernel(
    "triton_w4a8",
    level=Level.NATIVE,
    band="tuned",
    signatures={W4A8: SCHEMES[W4A8].operands(layout="int4_planes")},
    requires=(*TRITON, Needs.triton_math("e4m3fn", "e4m3fnuz"), QUANTIZED_ROWS),
)
def bind_triton_w4a8(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Quantize the input, turn int4 codes into 8-bit floats in the loop and multiply those."""
    read = w4a8_tensors(binding, weight)
    return _bind_triton(binding, weight, bias, "int4_group_fp8", read)


def w4a8_tensors(binding: Binding, weight: QTensor) -> tuple[torch.Tensor, ...]:
    """Return codes, and one scale a group for codes that count steps of 8-bit floats."""
    from hal.ops.kernels.kinds import FP8_UNITS

    return packed_tensors(weight, FP8_UNITS[encoding_of_rows(binding, weight)])


def _bind_triton(
    binding: Binding,
    weight: QTensor,
    bias: torch.Tensor | None,
    kind: str,
    read: Tensors | None = None,
) -> Bound:
    import torch

    from hal.ops.kernels.kinds import as_weight
    from hal.ops.kernels.linear import gemm
    from hal.ops.quantize import quantize_triton
    from hal.ops.specialized_linear import specialized_linear

    encoding, scheme = encoding_of_rows(binding, weight), weight.scheme
    rows_out, columns = weight.shape
    fixed, shifted = fixed_scale(weight), scheme.name in INT8_SHIFTED
    others: Tensors = ()
    if shifted:
        assert weight.scales is not None
        sums = column_sums(weight) if weight.zeros is None else weight.zeros
        others = (sums * weight.scales,)
    tiles = TileChoice(binding, kind, rows_out, columns)
    specialized = specialized_linear(binding, kind, weight.shape)
    has_bias = bias is not None

    def launch(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        out = x.new_empty(x.shape[0], rows_out)
        shifts: dict[str, Any] = {}
        given = tensors[2] if fixed else None
        codes, scales, *zeros = quantize_triton(x, encoding, scheme.activation, given)
        if specialized is not None and specialized.takes(x.shape[0]):
            held = as_weight(kind, columns, *tensors[:2])
            bias = tensors[-1] if has_bias else None
            if specialized.multiply(codes, tensors, held, out, bias, scales):
                return out
        if shifted:
            sums = zeros[0] if zeros else codes.sum(-1, dtype=torch.int32)
            shifts = {"a_shifts": sums * scales, "b_sums": tensors[2 + len(fixed)]}
        gemm(
            codes,
            tensors[0],
            out,
            a_scales=scales,
            b_scales=tensors[1],
            bias=tensors[-1] if has_bias else None,
            kind=kind,
            tile=tiles(x.shape[0]),
            **shifts,
        )
        return out

    return launch, _with_bias((*(read or row_scales(weight)), *fixed, *others), bias)


@LINEAR.kernel(
    "triton_packed",
    level=Level.WEIGHT_ONLY,
    band="tuned",
    signatures=PACKED,
    requires=(*TRITON, Needs.triton_math("bfloat16")),
)
def bind_triton_packed(binding: Binding, weight: QTensor, bias: torch.Tensor | None) -> Bound:
    """Decode codes of four bits, or scales of exponents, in the loop by integer shifts."""
    return _bind_decoded(binding, weight, bias, packed_kind(weight), packed_tensors(weight))


def _bind_decoded(
    binding: Binding,
    weight: QTensor,
    bias: torch.Tensor | None,
    kind: str,
    read: tuple[torch.Tensor, ...],
) -> Bound:
    from hal.ops.decoded import decoded_product

    launch = decoded_product(
        binding,
        kind,
        weight.shape,
        TileChoice(binding, kind, *weight.shape),
        scale_names(kind),
        has_bias=bias is not None,
        fnuz=weight.encoding == "e4m3fnuz",
    )
    return launch, _with_bias(read, bias)


def packed_kind(weight: QTensor) -> str:
    """Return what Triton's kernels call the product of codes under scales per group."""
    how = weight.scheme.weight
    if how.format == "int4":
        return f"{weight.encoding}_group_decode"
    if how.scale_format == "e4m3fn":
        return "nvfp4_decode"
    return "mxfp4_decode" if how.packed else "mxfp8_decode"


def scale_names(kind: str) -> tuple[str, ...]:
    """Return the launchers' names of the tensors that follow the codes."""
    if kind == "bf16":
        return ()
    further = {"nvfp4_decode": "b_second", "uint4_group_decode": "b_zeros"}.get(kind)
    return ("b_scales",) if further is None else ("b_scales", further)


def packed_tensors(weight: QTensor, unit: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Return what those kernels read; two-level scales of int4 become one float32 each, in units.

    Scales and zero points of neighbouring rows lie side by side: a tile reads those of one group.
    """
    from hal.ops.kernels.by_column import by_column, products_by_column

    assert weight.scales is not None
    second = weight.scheme.weight.second
    if second == "channel":
        assert weight.global_scale is not None
        return weight.values, products_by_column(weight.scales, weight.global_scale, unit)
    scales = by_column(weight.scales)
    if weight.zeros is not None:
        return weight.values, scales, by_column(weight.zeros)
    if second == "tensor":
        assert weight.global_scale is not None
        return weight.values, scales, weight.global_scale
    return weight.values, scales


class TileChoice:
    """Choose tiles for a number of rows a matrix, once per power of two of rows and matrices."""

    __slots__ = ("_arguments", "_binding", "_tiles")

    def __init__(self, binding: Binding, kind: str, rows_out: int, columns: int) -> None:
        from hal.ops.tuned import BIND_HOOKS

        spec = binding.spec
        self._tiles: dict[tuple[int, int, int], Tile] = {}
        self._arguments = {
            "kind": kind,
            "n": rows_out,
            "k": columns,
            "platform": spec.platform,
            "arch": spec.arch.name,
            "shared_memory_bytes": spec.shared_memory_bytes,
            "compute_units": spec.compute_units or 64,
        }
        self._binding = binding
        for hook in BIND_HOOKS:
            hook(self)

    @property
    def product(self) -> tuple[str, int, int]:
        """Return kind, n and k of the product."""
        arguments: dict[str, Any] = self._arguments
        return arguments["kind"], arguments["n"], arguments["k"]

    def __call__(self, rows: int, matrices: int = 1, block_m: int = 0) -> Tile:
        """Return the tile for `matrices` products of `rows` rows, with `block_m` if that is set."""
        key = max(rows - 1, 0).bit_length(), max(matrices - 1, 0).bit_length(), block_m
        tile = self._tiles.get(key)
        if tile is None:
            tile = self._tiles[key] = self._choose(1 << key[0], 1 << key[1], block_m)
        return tile

    def _choose(self, rows: int, matrices: int, block_m: int) -> Tile:
        from dataclasses import replace

        from hal.ops.tiles import choose_tile, fit
        from hal.ops.tuned import ProductSizes, find_tile

        arguments: dict[str, Any] = self._arguments
        sizes = ProductSizes(arguments["kind"], arguments["n"], arguments["k"], rows, matrices)
        chosen = self._binding.selection
        tuned = find_tile(chosen.op, chosen.scheme, chosen.spec, sizes, block_m)
        if tuned is not None:
            return tuned
        tile = choose_tile(rows=rows, matrices=matrices, **arguments)
        if not block_m or tile.block_m == block_m:
            return tile
        tile = fit(
            replace(tile, block_m=block_m),
            arguments["kind"],
            arguments["shared_memory_bytes"],
            platform=arguments["platform"],
        )
        assert tile.block_m == block_m, "fit shrinks rows last"
        return tile


def _with_bias(tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> Tensors:
    return tensors if bias is None else (*tensors, bias)


def _dtype(binding: Binding) -> torch.dtype:
    from hal.torch_compat import dtype

    return dtype(binding.problem("dtype", "bfloat16"))
