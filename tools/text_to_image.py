"""Make a picture with a diffusers pipeline whose transformer runs sequence-parallel.

    python -m seqpar.tools.text_to_image --model tiny:flux --prompt "a lighthouse" --ulysses-degree 2 --ring-degree 2 --compare

Starts its own local processes; `torchrun --nproc-per-node 4 -m seqpar.tools.text_to_image …` works too.
"""

import argparse
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import seqpar
from seqpar.errors import SeqparError
from seqpar.launching import LaunchError, Rank, launch, pick_device_type, this_rank
from seqpar.tools import picture, pipeline
from seqpar.tools.cli.command import add_comm_dtype, add_hardware, comm_dtype
from seqpar.tools.report import Comparison, RunReport

TINY_PREFIX = "tiny:"
EXAMPLE = """example, on any machine:
  python -m seqpar.tools.text_to_image --model tiny:flux --prompt "a lighthouse" \\
      --ulysses-degree 2 --ring-degree 2 --width 256 --height 256 --num-inference-steps 4 --compare --output lighthouse.png
example, on 4 GPUs:
  python -m seqpar.tools.text_to_image --model Qwen/Qwen-Image --prompt "a lighthouse" \\
      --ulysses-degree 2 --ring-degree 2 --width 1664 --height 928 --num-inference-steps 50 --output lighthouse.png
"""


@dataclass(frozen=True)
class Job:
    """What every rank has to know."""

    model: str
    request: pipeline.Request
    ulysses: int
    ring: int
    dtype: str | None
    backend: str | None
    comm_dtype: torch.dtype | None
    hardware: str | None
    compare: bool
    as_json: bool
    output: Path


def main(argv: list[str] | None = None) -> int:
    """Parse, launch, report. Returns the exit status: 0, or 1 after a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m seqpar.tools.text_to_image",
        description="Make a picture (or video) with a diffusers pipeline whose transformer runs sequence-parallel.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """What `main` does once the arguments are parsed."""
    job = job_of(args)
    try:
        picture.check_writable(job.output, job.request.num_frames or 1)
        launch(run_rank, job.ulysses * job.ring, job, device=pick_device_type(args.device))
    except LaunchError as error:
        print(f"error: {error.cause if error.expected else error}", file=sys.stderr)
        return 1
    except SeqparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that can be asked for."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a diffusers pipeline, or tiny:flux|qwen-image|wan|z-image|longcat-image (made beside the output, with random weights)")
    add("--prompt", required=True, help="what to draw")
    add("--negative-prompt", help="what not to draw, for pipelines that take it")
    add("--ulysses-degree", type=degree, default=1, metavar="U", help="ranks that exchange heads (default 1)")
    add("--ring-degree", type=degree, default=1, metavar="R", help="ranks that pass keys and values around (default 1)")
    add("--width", type=int, help="default: the pipeline's own")
    add("--height", type=int, help="default: the pipeline's own")
    add("--num-frames", type=int, help="for video pipelines (default 1: a picture)")
    add("--num-inference-steps", type=int, default=20, metavar="N", help="denoising steps (default 20)")
    add("--guidance-scale", type=float, help="default: the pipeline's own")
    add("--seed", type=int, default=0, help="of the latents (default 0)")
    add("--output", type=Path, default=Path("output.png"), help="picture to write (default output.png); several frames make an animation")
    add("--compare", action="store_true", help="run one process too, report the difference, save both side by side")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if this machine has one GPU or more")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, float32 on cpu")
    add("--backend", help='compiles the parallel program further, e.g. "inductor"')
    add_comm_dtype(parser)
    add_hardware(parser, "attentions communicate over the mesh, as the degrees say")
    add("--pipeline-argument", type=name_and_value, action="append", default=[], metavar="NAME=JSON", help="anything else the pipeline takes")
    add("--json", action="store_true", help="print the report as JSON")


def job_of(args: argparse.Namespace) -> Job:
    """The parsed arguments as a job."""
    request = pipeline.Request(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        width=args.width,
        height=args.height,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        extra=dict(args.pipeline_argument),
    )
    return Job(
        model=args.model,
        request=request,
        ulysses=args.ulysses_degree,
        ring=args.ring_degree,
        dtype=args.dtype,
        backend=args.backend,
        comm_dtype=comm_dtype(args),
        hardware=args.hardware,
        compare=args.compare,
        as_json=args.json,
        output=args.output,
    )


def degree(text: str) -> int:
    """A number of ranks, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of ranks: use 1 or more")
    return value


def name_and_value(text: str) -> tuple[str, Any]:
    """`true_cfg_scale=4.0` -> ("true_cfg_scale", 4.0); a value that is not JSON is taken as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run_rank(job: Job) -> None:
    """Everything one rank does; rank 0 saves, compares and prints."""
    rank = this_rank()
    leader = rank.rank == 0
    watched = leader and sys.stderr.isatty()
    if not watched:
        pipeline.be_quiet(warnings=leader)
    dtype = getattr(torch, job.dtype or ("bfloat16" if rank.device.type == "cuda" else "float32"))
    pipe = pipeline.load(_model_path(rank, job), rank.device, dtype)
    pipe.set_progress_bar_config(disable=not watched, desc="steps")
    parallel = seqpar.parallelize(pipe, ulysses=job.ulysses, ring=job.ring, backend=job.backend, comm_dtype=job.comm_dtype, hardware=job.hardware)
    generated = pipeline.generate(pipe, job.request, rank.device, decode=leader)
    peaks = _peak_memory(rank)
    if dist.is_initialized():  # from here on rank 0 is alone, and no other rank has to wait for it
        dist.destroy_process_group()
    if not leader:
        return
    assert generated.frames is not None, "rank 0 decodes"
    picture.save(generated.frames, job.output)
    plans, explanations = parallel.plans, parallel.pages
    parallel.unparallelize()
    comparison = _compare(pipe, job, rank.device, generated) if job.compare else None
    report = _report(job, pipe, rank.device, dtype, generated, peaks, plans, explanations, comparison)
    print(json.dumps(report.to_dict(), indent=2) if job.as_json else report.to_text(), flush=True)


def _model_path(rank: Rank, job: Job) -> str:
    if not job.model.startswith(TINY_PREFIX):
        return job.model
    name = job.model.removeprefix(TINY_PREFIX)
    folder = job.output.parent / f"tiny-{name}"
    if rank.rank == 0:
        pipeline.tiny_checkpoint(name, folder)
    if dist.is_initialized():
        dist.barrier()
    return str(folder)


def _peak_memory(rank: Rank) -> list[int]:
    """Bytes at the highest point, of every rank: allocated on the GPU, or resident on a CPU."""
    if rank.device.type == "cuda":
        mine = torch.cuda.max_memory_allocated(rank.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = [mine] * rank.world_size
    if rank.world_size > 1:
        dist.all_gather_object(peaks, mine)
    return peaks


def _compare(pipe: Any, job: Job, device: torch.device, parallel: pipeline.Generated) -> Comparison:
    """Generate again with the models as they were loaded, in this process alone."""
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="one process")
    alone = pipeline.generate(pipe, job.request, device)
    assert alone.frames is not None and parallel.frames is not None, "rank 0 decodes"
    path = job.output.with_name(f"{job.output.stem}_compare{job.output.suffix}")
    picture.save(picture.side_by_side(parallel.frames, alone.frames), path)
    latent_difference = (parallel.latents - alone.latents).norm() / alone.latents.norm()
    return Comparison(
        max_abs_pixel_difference=picture.max_abs_difference(parallel.frames, alone.frames),
        relative_latent_difference=float(latent_difference),
        seconds_per_step=alone.seconds_per_step,
        side_by_side=str(path),
    )


def _report(
    job: Job,
    pipe: Any,
    device: torch.device,
    dtype: torch.dtype,
    generated: pipeline.Generated,
    peaks: list[int],
    plans: list[Any],
    explanations: list[str],
    comparison: Comparison | None,
) -> RunReport:
    assert generated.frames is not None, "rank 0 decodes"
    frames, height, width, _ = generated.frames.shape
    return RunReport(
        model=job.model,
        pipeline=type(pipe).__name__,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        ulysses=job.ulysses,
        ring=job.ring,
        width=width,
        height=height,
        frames=frames,
        output=str(job.output),
        seconds_per_step=generated.seconds_per_step,
        peak_memory_bytes=peaks,
        plans=[plan.to_dict() for plan in plans],
        explanations=explanations,
        comparison=comparison,
    )


if __name__ == "__main__":
    sys.exit(main())
