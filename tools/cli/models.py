"""From a name on the command line to a model and inputs: a checkpoint folder, `module:Class`, `tiny:NAME` or `full:NAME`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqpar.errors import SeqparError
from seqpar.tools.cli.inputs import read_inputs

CONFIG, INDEX = "config.json", "model_index.json"
FORMS = "tiny:NAME or full:NAME (`seqpar models` lists them), a checkpoint folder, or MODULE:CLASS"


@dataclass(frozen=True)
class Named:
    """A model on its device, eval mode, and keyword inputs of its forward."""

    title: str
    model: torch.nn.Module
    inputs: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and its inputs."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=FORMS)
    add("--config", type=Path, metavar="FILE", help="JSON: the keyword arguments of CLASS")
    add("--component", metavar="NAME", help="which model of a pipeline folder (default: transformer or unet)")
    add("--inputs", type=Path, metavar="FILE", help="JSON: keyword inputs of forward; a tensor is {\"shape\": [1, 64, 16], \"dtype\": \"float32\"}")
    add("--inputs-of", metavar="NAME", help="make the inputs as this family's pipeline does (default: the family of the same class)")
    add("--height", type=int, help="pixels; with inputs made here (default: the family's own, 256 for tiny models)")
    add("--width", type=int, help="pixels")
    add("--frames", type=int, help="of a video")
    add("--text-len", type=int, help="text tokens")
    add("--batch", type=int, help="pictures or videos of one call")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights and inputs (default float32)")


def resolve(args: argparse.Namespace, *, device: str = "meta") -> Named:
    """The model and its inputs. On "meta" no weights are made; elsewhere they are random (`models.randomise`).

    Raises SeqparError if there is no such model, or nothing says what its inputs are.
    """
    dtype = getattr(torch, args.dtype)
    model, family, config = _build(args, device, dtype)
    title = f"{args.model} ({type(model).__name__})"
    if device != "meta":
        from seqpar.models.randomise import randomise

        randomise(model)
    if args.inputs is not None:
        return Named(title, model, read_inputs(args.inputs, device, dtype, inspect.signature(model.forward)))
    if args.inputs_of is not None:
        from seqpar.models import registry

        family = registry.get(args.inputs_of)
    family = family or _family_of(model)
    if family is None:
        raise SeqparError(f"nothing says what the inputs of {title} are: give --inputs FILE (see docs/cli.md), or --inputs-of NAME for those of a known family")
    return Named(title, model, _family_inputs(args, family, config, device, dtype))


def _build(args: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any, dict[str, Any] | None]:
    """The model, its family if the name says it, and its configuration (None: the family's tiny one)."""
    kind, colon, name = args.model.partition(":")
    if colon and kind in ("tiny", "full"):
        from seqpar.models import registry

        family = registry.get(name)
        config = family.full if kind == "full" else family.tiny
        return family.build(config, device=device, dtype=dtype), family, config
    if Path(args.model).is_dir():
        return _from_folder(Path(args.model), args.component, device, dtype)
    if colon and kind and name:
        return _from_class(kind, name, args.config, device, dtype)
    raise SeqparError(f"no model {args.model!r}: give {FORMS}")


def _from_folder(folder: Path, component: str | None, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, None, dict[str, Any]]:
    """Reads config.json only; the weights beside it are not touched."""
    if (folder / INDEX).is_file():
        parts = json.loads((folder / INDEX).read_text())
        usual = [name for name in ("transformer", "unet") if name in parts]
        chosen = component or (usual[0] if usual else None)
        if chosen is None or not (folder / chosen / CONFIG).is_file():
            known = sorted(name for name in parts if (folder / name / CONFIG).is_file())
            raise SeqparError(f"{folder} has no {chosen or 'transformer'}/{CONFIG}: choose one of {', '.join(known)} with --component")
        folder = folder / chosen
    if not (folder / CONFIG).is_file():
        raise SeqparError(f"{folder} has neither {CONFIG} nor {INDEX}: it is no checkpoint of diffusers")
    config = json.loads((folder / CONFIG).read_text())
    try:
        import diffusers

        kind = getattr(diffusers, config["_class_name"])
    except (ImportError, KeyError, AttributeError) as error:
        raise SeqparError(f"{folder / CONFIG} names no model class that diffusers has ({error}); for another class use MODULE:CLASS --config FILE") from error
    with torch.device(device):
        model = kind.from_config(config)
    return _finished(model, dtype), None, dict(model.config)


def _from_class(module: str, name: str, file: Path | None, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, None, dict[str, Any]]:
    if os.getcwd() not in sys.path:  # an installed script does not look into the working directory, `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SeqparError(f"cannot import {name} from {module}: {error}") from error
    config = json.loads(file.read_text()) if file is not None else {}
    config = {key: value for key, value in config.items() if not key.startswith("_")}  # notes of a saved configuration
    try:
        with torch.device(device):
            model = kind(**config)
    except TypeError as error:
        raise SeqparError(f"{name}(**{sorted(config)}) failed: {error}; put its keyword arguments into a JSON file and give --config FILE") from error
    if not isinstance(model, torch.nn.Module):
        raise SeqparError(f"{module}:{name} makes a {type(model).__name__}, which is no torch.nn.Module")
    return _finished(model, dtype), None, {**config, **dict(getattr(model, "config", None) or {})}


def _finished(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    from seqpar.models.family import cast

    return cast(model, dtype).eval()


def _family_of(model: torch.nn.Module) -> Any:
    """The first family whose models are of exactly this class."""
    from seqpar.models import registry

    for name in registry.names():
        try:
            family = registry.get(name)
        except SeqparError:  # needs a package that is not installed
            continue
        if type(family.build(device="meta")) is type(model):
            return family
    return None


def _family_inputs(args: argparse.Namespace, family: Any, config: dict[str, Any] | None, device: str, dtype: torch.dtype) -> dict[str, Any]:
    asked = {"height": args.height, "width": args.width, "frames": args.frames, "text_len": args.text_len, "batch": args.batch}
    given = {key: value for key, value in asked.items() if value is not None}
    tiny = config is None or args.model.startswith("tiny:")
    defaults = {"height": 256, "width": 256} if tiny else dict(family.native)
    try:
        return family.example_inputs(config, **{**defaults, **given}, device=device, dtype=dtype)
    except ValueError as error:
        raise SeqparError(str(error)) from error
    except KeyError as error:
        raise SeqparError(f"the configuration has no {error}, which the inputs of {family.name} need: give --inputs FILE") from error
