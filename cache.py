"""Programs kept on disk between starts, found again by a digest of all that decides them.

A file is named by the digest (`passes/state_digest.py`) of the model without its weights, its code, the call, the mesh, the settings and the
versions; it holds the programs of all ranks as `saving.py` writes them. Off unless `seqpar.config(cache_dir=…)` or SEQPAR_CACHE_DIR names a folder.
A program for values that the model reads from its inputs has a file of its own, found if the inputs hold these values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seqpar.errors import SavedProgramError
from seqpar.passes.arguments import Call
from seqpar.passes.checksum import weights_checksum
from seqpar.passes.config import config
from seqpar.passes.progress import collector_paused
from seqpar.passes.save_values import Codec
from seqpar.passes.state_digest import Digest, Unknown, own_code, torch_settings
from seqpar.program import Program, Saved
from seqpar.saved_program import read_program, write_program
from seqpar.saving import HEADER, device_of, opened, write_whole

if TYPE_CHECKING:
    from seqpar.compile import Compiler

log = logging.getLogger("seqpar.cache")

FORMAT = 1
MAX_VALUES = 16  # files of one key, for different values read from inputs


@dataclass(frozen=True)
class Kept:
    """A program from a file; digest: of the file, equal on ranks that read the same."""

    program: Program
    digest: str


@dataclass(frozen=True)
class Cache:
    """The place of the programs for one call. key: what the call, the model and everything else that decides them is, as hex digits."""

    folder: Path
    key: str
    builder: Compiler
    call: Call

    @staticmethod
    @collector_paused()
    def of(builder: Compiler, call: Call, dynamic: bool | None) -> Cache | None:
        """The place for a call, or None: no folder is set, or something in the model cannot be told apart from others (logged)."""
        folder = config.cache_dir
        if folder is None:
            return None
        try:
            return Cache(folder, key_of(builder, call, dynamic), builder, call)
        except Unknown as unknown:
            log.info("%s is compiled without the cache: %s, and nothing tells one from another", type(builder.model).__name__, unknown)
        except Exception as error:  # a model may hold anything; compiling it must not fail for that
            log.warning("%s is compiled without the cache, its state cannot be read: %s: %s", type(builder.model).__name__, type(error).__name__, error)
        return None

    @cached_property
    def weights(self) -> str:
        """Tells the weights from others: tables that a model computes from them are constants of its program."""
        return weights_checksum(self.builder.model)

    def files(self) -> list[Path]:
        """The files of this key, oldest name first."""
        return sorted(self.folder.glob(f"{self.key}-*.seqpar"))[:MAX_VALUES]

    @collector_paused()
    def read(self) -> Kept | None:
        """The program for the call, or None. A file that cannot be read is passed over."""
        tensors = [leaf for leaf in self.call.leaves if isinstance(leaf, torch.Tensor)]
        for path in self.files():
            started = time.perf_counter()
            try:
                kept = self.read_file(path)
                fits = kept is not None and kept.program.interface.sizes.failed([tensor.shape for tensor in tensors]) is None and kept.program.fits(tensors)
            except Exception as error:  # a file may hold anything; compiling must not fail for that, on one rank least of all
                log.warning("%s is passed over: %s: %s", path, type(error).__name__, error)
                continue
            if kept is not None and fits:
                seconds = time.perf_counter() - started
                log.info("%s: the program was read from %s in %.1f s", type(self.builder.model).__name__, path, seconds)
                interface = dataclasses.replace(kept.program.interface, seconds=seconds)
                return Kept(dataclasses.replace(kept.program, interface=interface), kept.digest)
        return None

    def read_file(self, path: Path) -> Kept | None:
        """The program of one file; None if it holds tables that come from other weights."""
        with opened(path) as archive:
            header = archive.json(HEADER)
            if (header["format"], header["key"]) != (FORMAT, self.key):
                raise SavedProgramError("it was written for something else than its name says")
            if header["weights"] not in (None, self.weights):
                log.info("%s is passed over: it holds tables computed while tracing, and the weights are others", path)
                return None
            program = read_program("program0", archive.json, archive.bytes, self.builder.model, self.builder, Codec(device_of(self.builder.model)))
            return Kept(dataclasses.replace(program, saved=Saved(archive.data, "program0")), archive.digest)

    def write(self, program: Program) -> None:
        """Keep a program; what cannot be kept is logged. One rank of a host writes."""
        builder = self.builder
        if builder.mesh is not None and builder.mesh.rank > 0 and os.environ.get("LOCAL_RANK") != "0":
            return
        members: dict[str, Any] = {}
        raw: dict[str, bytes] = {}
        try:
            write_program("program0", program, Codec(device_of(builder.model)), builder.settings.ranks, members, raw, pictures=False)
            constants = members["program0.json"]["constants"]["tensors"]
            weights = self.weights if constants else None
            members[HEADER] = {"format": FORMAT, "key": self.key, "weights": weights}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{self.key}-{variant(program, weights)}.seqpar", members, raw)
        except SavedProgramError as error:
            log.info("%s is not kept in the cache: %s", type(builder.model).__name__, error)
        except OSError as error:
            log.warning("%s cannot be kept in %s: %s", type(builder.model).__name__, self.folder, error)


def variant(program: Program, weights: str | None) -> str:
    """Names one of the programs of a key: by the values it is made for among those that the model may read from its inputs, and by the weights if it has tables of them."""
    guard = program.interface.guard
    shapes = [] if guard is None else [(read.reduce, tuple(read.value.shape), read.value.dtype) for read in guard.reads]
    content = b"" if guard is None else guard.recorded.numpy().tobytes()
    return hashlib.sha256(f"{weights} {shapes}".encode() + content).hexdigest()[:16]


def key_of(builder: Compiler, call: Call, dynamic: bool | None) -> str:
    """A digest of what decides the programs for a call.

    Raises:
        Unknown: a part of the model or of the call cannot be told apart from others.
    """
    digest = Digest()
    digest.text("seqpar", FORMAT, own_code(), *torch_settings(device_of(builder.model).type))
    asked = builder.settings
    digest.text(asked.ulysses, asked.ring, dynamic, asked.backend, asked.comm_dtype, asked.machine, call.spec, call.positional, call.paths, call.signature)
    digest.value(asked.plan, "sp_plan")
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            digest.text(path, tuple(leaf.shape), leaf.dtype, leaf.device.type)
        else:
            digest.value(leaf, path)
    digest.value(builder.model, type(builder.model).__name__)
    return digest.finish()[:40]
