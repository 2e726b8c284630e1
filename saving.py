"""`seqpar.save` and `seqpar.load`: programs in a file, so that a server starts without tracing.

The file is a zip of JSON and raw bytes of constants: the programs of all ranks, their plans, and what they depend on. No weights, no pickles, no
code: reading it runs nothing, and what its programs may call is a fixed list (`passes/save_targets.py`).
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqpar.compile import Compiler, Settings, device_type, sequence_mesh, versions
from seqpar.errors import MeshError, SavedProgramError
from seqpar.fingerprint import first_difference, model_facts
from seqpar.module import SequenceParallelModule, first_parameter
from seqpar.partitioner.machines import read_rates, write_rates
from seqpar.passes.save_values import Codec
from seqpar.runtime.travel import COMM_DTYPES
from seqpar.saved_program import read_module, write_module

FORMAT = 3
HEADER = "seqpar.json"
MAX_BYTES = 8 << 30  # unpacked


def save(compiled: SequenceParallelModule, path: str | os.PathLike[str]) -> None:
    """Write all programs of a compiled module, for all ranks, to one file. Every rank calls it; the first rank writes.

    Args:
        compiled: what `sp_compile` (or `load`) returned.
        path: the file; it is replaced as a whole.

    Raises:
        SavedProgramError: a program holds something that a file cannot (a user's own operator, an object with attributes, …); names it.
    """
    builder, model = compiled._builder, compiled._model
    if not isinstance(builder, Compiler):
        raise SavedProgramError("only what sp_compile returned can be saved")
    if (found := compiled._watches.changes()):
        raise SavedProgramError(f"the model was changed since its programs were made ({', '.join(found)}): call it once, so that they are made anew, and save then")
    codec = Codec(device_of(model))
    first = builder.mesh is None or builder.mesh.rank == 0
    asked = builder.settings
    content, raw = write_module(compiled, codec, asked.ranks, pictures=first)
    header = {
        "format": FORMAT, "versions": versions(), "ulysses": asked.ulysses, "ring": asked.ring, "device": codec.device.type,
        "dynamic": asked.dynamic, "backend": asked.backend, "comm_dtype": codec.write(asked.comm_dtype),
        "hardware": write_rates(asked.machine), "model": model_facts(model),
    }  # fmt: skip
    if not first:
        return
    write_whole(Path(path), {HEADER: header, **content}, raw)


def write_whole(target: Path, members: Mapping[str, Any], raw: Mapping[str, bytes]) -> None:
    """Write a file of programs. A reader sees the old file or the new one, also while other groups of ranks write the same."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        write_archive(part, members, raw)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_archive(path: Path, members: Mapping[str, Any], raw: Mapping[str, bytes]) -> None:
    """A zip of JSON members and raw ones."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, value in members.items():
            archive.writestr(name, json.dumps(value, allow_nan=False, separators=(",", ":")))
        for name, data in raw.items():
            archive.writestr(name, data)


def load(
    path: str | os.PathLike[str], model: torch.nn.Module, *, ulysses: int | None = None, ring: int | None = None, mesh: Any = None
) -> SequenceParallelModule:
    """The module that was saved, over the parameters of `model`: same class, same configuration, any weights. Every rank calls it.

    A call whose sizes no program of the file fits is compiled as usual.

    Args:
        path: the file; the same content on every rank.
        model: made as the one that was saved was.
        ulysses: the degree that the file should be for; any if None.
        ring: likewise.
        mesh: as for `sp_compile`.

    Raises:
        SavedProgramError: the file is for other versions, another model or device, or is damaged; names the first difference.
        MeshError: it is for other degrees or another number of ranks.
        DisagreementError: the ranks read different files.
    """
    with opened(path) as archive:
        header = archive.json(HEADER)
        check_header(header, path)
        degrees = (header["ulysses"], header["ring"])
        for name, wanted, found in zip(("ulysses", "ring"), (ulysses, ring), degrees, strict=True):
            if wanted not in (None, found):
                raise MeshError(f"{path} holds programs for {name}={found}, not {wanted}: compile for the new degrees and save again")
        built = sequence_mesh(*degrees, mesh, device_type(model, (), {}))
        rounded = Codec(device_of(model)).read(header.get("comm_dtype"))
        asked = Settings(*degrees, header["dynamic"], header["backend"], comm_dtype=rounded, machine=read_rates(header.get("hardware")))
        builder = Compiler(model, asked, built)
        try:
            check_model(header, model, path)
            loaded = read_module(archive.data, archive.json, archive.bytes, model, builder, Codec(device_of(model)))
        except Exception as error:
            builder.tell_failure(error)
            raise
        builder.agree(f"load a file\n{archive.digest}")
        return SequenceParallelModule(model, builder, (), {}, loaded=loaded)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the parameters are; the CPU for a model without any."""
    parameters, name = first_parameter(model)
    return parameters[name].device if name else torch.device("cpu")


def check_header(header: Any, path: Any) -> None:
    """Raise SavedProgramError unless the file is for these versions of seqpar and torch."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise SavedProgramError(f"{path} is not a file of programs of format {FORMAT}; save it again with this version of seqpar ({versions()})")
    if header.get("versions") != versions():
        raise SavedProgramError(f"{path} was written by {header.get('versions')}, and this is {versions()}: compile and save again")
    plain = type(header.get("ulysses")) is int and type(header.get("ring")) is int and isinstance(header.get("model"), dict)
    named = header.get("backend") is None or (isinstance(header["backend"], str) and re.fullmatch(r"\w+", header["backend"]))
    rounded = header.get("comm_dtype") in (None, *({"dtype": str(dtype).removeprefix("torch.")} for dtype in COMM_DTYPES))
    try:
        read_rates(header.get("hardware"))
    except ValueError:
        plain = False
    if not plain or not named or not rounded or header.get("dynamic") not in (None, True, False):
        raise SavedProgramError(f"{path} is damaged: its header does not say what it is for")


def check_model(header: dict[str, Any], model: torch.nn.Module, path: Any) -> None:
    """Raise SavedProgramError unless the file is for this model on this kind of device."""
    difference = first_difference(header["model"], model_facts(model))
    if difference is not None:
        raise SavedProgramError(f"{path} was made for another model than this {type(model).__name__}: {difference}. Compile and save again")
    if header["device"] != device_of(model).type:
        raise SavedProgramError(f"{path} was made for a model on {header['device']}, and this one is on {device_of(model).type}: compile and save there")


@dataclass(frozen=True)
class Archive:
    """An opened file. data: its bytes; digest: of them."""

    zip: zipfile.ZipFile
    data: bytes
    digest: str

    def bytes(self, name: str) -> bytes:
        """The content of a member."""
        try:
            return self.zip.read(name)
        except KeyError:
            raise SavedProgramError(f"the file has no member {name}") from None

    def json(self, name: str) -> Any:
        """A member as plain data."""
        return json.loads(self.bytes(name))


@contextlib.contextmanager
def opened(path: Any) -> Iterator[Archive]:
    """A file of programs; whatever is wrong with its form is a SavedProgramError."""
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                raise SavedProgramError(f"{path} unpacks to more than {MAX_BYTES >> 30} GiB")
            yield Archive(archive, data, hashlib.sha256(data).hexdigest())
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SavedProgramError(f"{path} is no file of programs, or is damaged: {type(error).__name__}: {error}") from None
