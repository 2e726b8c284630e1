"""What things cost: floating-point operations per node, and a small model of the machine.

Unit of all costs: floating-point operations of one rank. Communication is converted with the machine's ratio of operations
per byte. The user asked for a number of ranks, so the ratio is capped: moving everything an attention needs to
move may never look more expensive than a small share of the work it lets the ranks divide. For hardware that the user named there is no
cap: its rates decide how attentions communicate, while their rows are divided at any price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from seqpar.partitioner.edges import CONV_EDGES
from seqpar.partitioner.equation import einsum_flops
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.marker import is_marker
from seqpar.partitioner.op import outputs_of, shape_of

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
SUMS = (aten.addmm.default, aten.baddbmm.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, CONV_EDGES)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
ATTENTION = (aten.scaled_dot_product_attention.default, torch.ops.higher_order.flex_attention)
QUANTISED = (
    aten._int_mm.default, aten._scaled_mm.default, aten._weight_int8pack_mm.default, aten._weight_int4pack_mm_for_cpu.default, aten._dyn_quant_matmul_4bit.default,
)  # fmt: skip
QUANTISED_ELSEWHERE = ("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit", "aten::_weight_int4pack_mm")  # by name: nobody may have that library, or the device
RECURRENT = (aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)
CONTRACTIONS = frozenset((*RECURRENT, *PRODUCTS, *SUMS, *CONVOLUTIONS, *TRANSPOSED, *ATTENTION, aten.einsum.default))
OPERATIONS_PER_BYTE = 100  # that a processor does in the time in which it moves a byte of its memory: 60 to 150 on today's GPUs


@dataclass(frozen=True)
class Machine:
    """Rates of one rank: what is reached, not the peak. Defaults: a Hopper-class GPU on NVLink.

    Attributes:
        flops_per_s: floating-point operations.
        bytes_per_s: bytes that one rank receives.
        comm_share: cap of the solver's prices, like the next two: a full exchange costs at most this share of the work it divides.
        call_share: an extra collective must save this share of one attention block's work.
        keys_share: one that serves only the keys of a cross-attention must save this share.
        encoder_share: if positions attend from these keys as well (an encoder), this share of what a rank has of one block. All four infinite: real rates (`at_real_rates`).
        latency_s: of one collective call; predictions read it, the solver at real rates only.
        memory_bytes: of one rank, for predictions; infinite: unknown.
        name: what is printed.
    """

    flops_per_s: float = 400e12
    bytes_per_s: float = 150e9
    comm_share: float = 0.02  # cap: full exchange <= this share of the work saved by dividing it
    call_share: float = 0.02  # an extra collective must save this share of one attention block's work
    keys_share: float = 0.5  # one that only serves the keys of a cross-attention must save this share
    encoder_share: float = 0.1  # or this share of a rank's part of one block, if the keys are an encoder's
    latency_s: float = 20e-6
    memory_bytes: float = math.inf
    name: str = "Hopper, NVLink"

    def at_real_rates(self) -> Machine:
        """This machine without caps: a byte costs what the link takes for it, a collective its latency."""
        return replace(self, comm_share=math.inf, call_share=math.inf, keys_share=math.inf, encoder_share=math.inf)


@dataclass(frozen=True)
class Prices:
    """Prices in floating-point operations: `byte` per received byte, `call` per extra collective, `keys` per collective for cross-attention keys,
    `encoded` if those are a sequence that attends to itself.

    real: they are the machine's rates, so the strategies of attentions are compared by time.
    """

    byte: float
    call: float
    keys: float
    encoded: float
    real: bool = False

    def serving(self, weight: float) -> float:
        """Of a collective that serves only keys, of a sequence of this weight (`Inference.sequences`)."""
        return self.encoded if weight > 0 else self.keys


def prices(machine: Machine, work: float, exchange_bytes: float, attentions: int, ranks: int) -> Prices:
    saved = work * (1 - 1 / ranks)
    byte = machine.flops_per_s / machine.bytes_per_s
    if math.isinf(machine.comm_share):
        call = machine.flops_per_s * machine.latency_s
        return Prices(byte=byte, call=call, keys=call, encoded=call, real=True)
    if exchange_bytes:
        byte = min(byte, machine.comm_share * saved / exchange_bytes)
    block, latency = work / max(attentions, 1), machine.flops_per_s * machine.latency_s
    return Prices(byte=byte, call=min(machine.call_share * block, latency), keys=machine.keys_share * block, encoded=machine.encoder_share * block / ranks)


def numel(value: torch.Tensor, sizes: Sizes) -> int:
    return math.prod(sizes.hint(s) for s in shape_of(value))


def nbytes(value: torch.Tensor, sizes: Sizes) -> int:
    return numel(value, sizes) * value.element_size()


def attention_pairs(rows: int, columns: int, is_causal: bool) -> int:
    """Pairs of query and key that attention computes: all, or those of the lower triangle."""
    if not is_causal:
        return rows * columns
    square = min(rows, columns)
    return square * (square + 1) // 2 + (rows - square) * columns


def contraction_flops(target: object, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: list[tuple[int, ...]], out: tuple[int, ...]) -> int:
    """Multiply-add counted as two. `shapes` are those of the tensor arguments in call order; 0 for anything but a contraction."""
    if target in PRODUCTS or is_quantised(target):
        return 2 * math.prod(out) * shapes[0][-1]
    if target in SUMS:
        return 2 * math.prod(out) * shapes[1][-1]
    if target in CONVOLUTIONS:
        return 2 * math.prod(out) * math.prod(shapes[1][1:])
    if target in TRANSPOSED:
        return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if target in RECURRENT:  # every position goes through all matrices
        return 2 * math.prod(shapes[0][:-1]) * sum(math.prod(shape) for shape in shapes[1:] if len(shape) == 2)
    if target is aten.einsum.default:
        return einsum_flops(str(args[0]), shapes)
    if target in ATTENTION:
        return 2 * math.prod(out[:-2]) * attention_pairs(out[-2], shapes[1][-2], is_causal(target, args, kwargs)) * (shapes[0][-1] + out[-1])
    return 0


def is_causal(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is attention of the lower triangle."""
    if target is not aten.scaled_dot_product_attention.default:
        return False
    return bool(args[5] if len(args) > 5 else kwargs.get("is_causal", False))


def is_quantised(target: object) -> bool:
    return target in QUANTISED or getattr(target, "_name", "") in QUANTISED_ELSEWHERE


def is_contraction(target: object) -> bool:
    """`contraction_flops` counts the work of this operator."""
    return target in CONTRACTIONS or is_quantised(target)


def node_work(node: Node, sizes: Sizes) -> int:
    """Operations of a node on whole operands, for the solver: contractions, and one per element of anything else."""
    if node.op != "call_function" or is_marker(node):
        return 0
    return node_flops(node, sizes) or (0 if "flops" in node.meta else sum(numel(v, sizes) for v in outputs_of(node)))


def node_flops(node: Node, sizes: Sizes) -> int:
    """Operations of a contraction on whole operands (measured, where the node says so); 0 for anything else."""
    if "flops" in node.meta:
        return int(node.meta["flops"])
    outs = outputs_of(node)
    if not outs or not is_contraction(node.target):
        return 0
    operands: list[Node] = []
    map_arg((node.args, node.kwargs), operands.append)
    shapes = [tuple(sizes.hint(s) for s in shape_of(n.meta["val"])) for n in operands if isinstance(n.meta.get("val"), torch.Tensor)]
    out = tuple(sizes.hint(s) for s in shape_of(outs[0]))
    return contraction_flops(node.target, node.args, node.kwargs, shapes, out) if shapes else 0
