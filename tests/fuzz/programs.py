"""Random attention models, described by plain data so that a failing one can be printed and shrunk."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import asdict, dataclass

import torch
from attention_steps import AttentionSteps
from token_steps import TokenSteps
from torch import Tensor, nn

STEPS = tuple(sorted(name.removeprefix("step_") for name in (*vars(AttentionSteps), *vars(TokenSteps)) if name.startswith("step_")))


@dataclass(frozen=True)
class Program:
    """A model on an image stream [B, image, C] and a text stream [B, text, C], with a third sequence [B, extra, C] beside them.

    steps: (name, number) pairs executed in order; `number` selects a variant of the step.
    """

    image: int
    text: int
    extra: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    steps: tuple[tuple[str, int], ...]
    dtype: str = "float32"
    seed: int = 0


class RandomModel(AttentionSteps, TokenSteps):
    """Interprets a `Program`. Every step keeps both streams' shapes, so any sequence of steps is a model."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(program.seed)
        dtype, width, kv = getattr(torch, program.dtype), program.heads * program.head_dim, program.kv_heads * program.head_dim

        def matrix(rows: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(rows, width, generator=generator) / width**0.5).to(dtype))

        self.q = nn.ParameterList([matrix(width) for _ in program.steps])
        self.k = nn.ParameterList([matrix(kv) for _ in program.steps])
        self.v = nn.ParameterList([matrix(kv) for _ in program.steps])
        self.o = nn.ParameterList([matrix(width) for _ in program.steps])
        self.position = nn.Parameter((torch.randn(1, program.image, width, generator=generator) / 2).to(dtype))

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        for i, (name, variant) in enumerate(self.program.steps):
            image, text = getattr(self, "step_" + name)(image, text, text_mask, extra, i, variant)
        return image, text


def inputs(program: Program) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, text, a text mask in which the last element has padding (where text is long enough), and the third sequence."""
    generator = torch.Generator().manual_seed(program.seed + 1)
    dtype, width = getattr(torch, program.dtype), program.heads * program.head_dim
    image, text, extra = (torch.randn(program.batch, n, width, generator=generator).to(dtype) for n in (program.image, program.text, program.extra))
    mask = torch.ones(program.batch, program.text, dtype=torch.bool)
    if program.text > 1:
        mask[-1, -(program.text // 2) :] = False
    return image, text, mask, extra


def source(program: Program, ulysses: int, ring: int, options: str = "", machine: str = "Machine()") -> str:
    """A script that builds the model and verifies it, made of the steps it has and nothing else."""
    methods = _needed(["step_" + name for name, _ in program.steps])
    steps = [f"image, text = self.step_{name}(image, text, text_mask, extra, {i}, {variant})" for i, (name, variant) in enumerate(program.steps)]
    forward = ["def forward(self, image, text, text_mask, extra):", *("    " + step for step in steps), "    return image, text"]
    init = textwrap.dedent(inspect.getsource(RandomModel.__init__))
    body = "\n\n".join([init.strip(), "\n".join(forward), *(textwrap.dedent(inspect.getsource(getattr(RandomModel, name))).strip() for name in methods)])
    return "\n".join(
        [
            "from __future__ import annotations\n",
            "from types import SimpleNamespace\n",
            "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n",
            "from math import inf\n\nfrom seqpar.partitioner.cost import Machine\nfrom seqpar.passes.options import Options\nfrom seqpar.passes.trace import trace\nfrom seqpar.verification import verify_traced\n\n",
            "class Model(nn.Module):",
            textwrap.indent(body, "    "),
            "\n",
            inspect.getsource(inputs),
            "",
            f"program = SimpleNamespace({', '.join(f'{key}={value!r}' for key, value in asdict(program).items())})",
            "model = Model(program).eval()",
            f"report = verify_traced(trace(model, inputs(program), {{}}, dynamic=False), ulysses={ulysses}, ring={ring}, machine={machine}, options=Options({options}))",
            "print(report)",
        ]
    )


def _needed(names: list[str]) -> list[str]:
    """These methods and all they call."""
    found: list[str] = []
    while names:
        name = names.pop(0)
        if name not in found:
            found.append(name)
            names += [used for used in re.findall(r"self\.(\w+)\(", inspect.getsource(getattr(RandomModel, name))) if hasattr(RandomModel, used)]
    return found
