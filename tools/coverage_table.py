"""Print coverage results: one line per case for people watching, a Markdown table for the documentation."""

import re
from importlib.metadata import version
from typing import Any

Result = dict[str, Any]
TOLERANCE = 1e-5
MESHES = ("u2", "r2", "u4", "u2r2")
FULLY = 0.95  # a case below this share of sharded work gets its reasons told


def entries(result: Result) -> list[tuple[str, str, Result]]:
    """(variant, mesh, entry) of everything that was measured; mesh "-" for a variant that was not traced."""
    found = []
    for variant, entry in result["variants"].items():
        if not entry["traced"]:
            found.append((variant, "-", entry))
        found += [(variant, mesh, e) for mesh, e in entry.get("meshes", {}).items()]
    return found


def state(result: Result) -> str:
    """"ok", "WRONG", "RAISED" or "UNTRACED"; the worst of all entries."""
    found = entries(result)
    if any(mesh == "-" for _, mesh, _ in found):
        return "UNTRACED"
    if any("error" in e for _, _, e in found):
        return "RAISED"
    wrong = any(e.get("ok") is False for _, _, e in found) or any(e.get("backend", {}).get("ok") is False for e in result["variants"].values())
    wrong = wrong or any(e.get("trace_err", 0.0) > TOLERANCE for e in result["variants"].values())
    return "WRONG" if wrong else "ok"


def worst_error(result: Result) -> float:
    """Of the simulated ranks against the traced graph, and of the traced graph against the model."""
    errors = [e["rel_err"] for _, _, e in entries(result) if "rel_err" in e]
    return max(errors + [e["trace_err"] for e in result["variants"].values() if "trace_err" in e], default=float("nan"))


def fraction(result: Result, variant: str) -> float:
    """The smallest sharded fraction of a variant's meshes."""
    return min((e["fraction"] for v, _, e in entries(result) if v == variant and "fraction" in e), default=float("nan"))


def first_problem(result: Result) -> str:
    for variant, mesh, e in entries(result):
        if "error" in e:
            return f"{variant} {mesh}: {e['error']}"
    for variant, mesh, e in entries(result):
        if e.get("ok") is False:
            return f"{variant} {mesh}: first at {e['first_divergence']}"
    return ""


def summary_line(result: Result) -> str:
    numbers = f"error {worst_error(result):.1e}  sharded {fraction(result, 'even'):.2f} tiny, {fraction(result, 'large'):.3f} large"
    return f"{state(result):<8} {result['case']:<44} {numbers}  {result.get('seconds', 0):.0f} s  {first_problem(result)[:160]}".rstrip()


def largest(result: Result, mesh: str) -> Result:
    """The entry of a mesh at the largest size measured."""
    found = {v: e for v, m, e in entries(result) if m == mesh and "attention" in e}
    return next((found[v] for v in ("large", "even", "odd") if v in found), {})


def strategies(result: Result) -> str:
    """Attention strategies at u2r2 (or u2, where heads do not suffice), folded."""
    counts: dict[str, int] = {}
    for a in (largest(result, "u2r2") or largest(result, "u2")).get("attention", ()):
        counts[a["strategy"]] = counts.get(a["strategy"], 0) + a["count"]
    return ", ".join(f"{n} {s}" for s, n in counts.items()) or "none"


def tracing(result: Result) -> str:
    """How it traced: plain, with values replayed, with modules that run whole."""
    variants = result["variants"].values()
    modules = {name for e in variants for name in e.get("opaque", ())}
    reads = max((e.get("reads", 0) for e in variants), default=0)
    found = [f"{reads} values replayed"] * bool(reads) + [f"{len(modules)} opaque modules"] * bool(modules)
    return ", ".join(found) or ("plain" if any(e["traced"] for e in variants) else "not at all")


def errors(result: Result, variant: str) -> str:
    """Relative errors on all meshes of a variant; a dash where a mesh does not fit."""
    meshes = result["variants"].get(variant, {}).get("meshes", {})
    return " ".join(f"{meshes[m]['rel_err']:.0e}".replace("e-0", "e-").replace("0e+00", "0") if "rel_err" in meshes.get(m, {}) else "-" for m in MESHES)


def compiled(result: Result) -> str:
    """Under torch.compile: the error with its number of graphs, or what failed."""
    found = result["variants"].get("even", {}).get("backend")
    if not found:
        return ""
    if "error" in found:
        return "error"
    return f"{'ok' if found['ok'] else 'WRONG'}, {found['split']} of {found['graphs']} graphs split"


def peer(result: Result) -> str:
    """Bytes of seqpar over those of diffusers' own plan, where it has one."""
    found = []
    for mesh, theirs in result["variants"].get("large", {}).get("peer", {}).items():
        ours = result["variants"]["large"]["meshes"].get(mesh, {}).get("comm_bytes")
        if "bytes" not in theirs:
            found.append(f"{mesh} refused")
        elif ours is not None and theirs["bytes"]:
            found.append(f"{mesh} {ours / theirs['bytes']:.2f}")
    return ", ".join(found)


def reasons(result: Result) -> list[str]:
    """What every rank repeats at sequence-dominant size on the worst mesh, most work first."""
    worst = min((m for m in MESHES if "fraction" in largest(result, m)), key=lambda m: largest(result, m)["fraction"], default="u2")
    replicated = largest(result, worst).get("replicated", ())
    told = [r for r in replicated if r["share"] > 0.005][:5]
    if not told and worst in MESHES and result["variants"].get("large"):
        return [f"{worst}: no operator is repeated; positions that do not divide evenly leave one rank more work than the others"]
    return [f"{worst}: {r['share']:.1%} {r['count']} x {r['op']}: {r['reason']} ({re.sub(r'.*/', '', r['source'])})" for r in told]


def number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def introduction(results: list[Result]) -> list[str]:
    """What was run with which versions, the figures of all cases and classes, and how to read the columns."""
    right = sum(state(r) == "ok" for r in results)
    classes: dict[str, list[Result]] = {}
    for r in results:
        classes.setdefault(r["case"].split("@")[0], []).append(r)
    full = sum(all(fraction(r, "large") >= FULLY for r in members) for members in classes.values())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return [
        "# Supported models\n",
        f"Made by `python -m seqpar.tools.coverage --work DIR --table docs/models.md` with {versions}, on CPU.\n",
        f"{right} of {len(results)} cases are right. {full} of {len(classes)} classes divide at least {FULLY} of the work at sequence-dominant size in all their cases,",
        "on the worst of u2, r2 and u2r2. Weights are random, nothing is left at zero.\n",
        "- **case**: a class, and behind `@` which of its configurations or inputs.",
        f"- **error**: all simulated ranks against the model, relative, on {', '.join(MESHES)} (ulysses, ring) in this order; even: lengths that the ranks divide, odd:",
        "  lengths they do not, batch 2, padding in the masks.",
        '- **torch.compile**: the graphs of `torch.compile(backend="seqpar")` on u2; the others have no attention over a sequence, or only torch.nn\'s fused encoder layer.',
        "- **sharded**: the share of the FLOPs that is divided, of a tiny call and of one with at least 1,024 tokens.",
        "- **bytes / own plan**: received bytes over those of the class's own diffusers plan; refused: diffusers raises.\n",
    ]


def table(results: list[Result]) -> str:
    """One row per case, then the reasons of those that are not fully sharded, or not right."""
    head = ["case", "state", "traced", "attention (u2r2)", "error, even", "error, odd", "torch.compile", "sharded, tiny", "sharded, large", "bytes / own plan"]
    rows = [
        [r["case"], state(r), tracing(r), strategies(r), errors(r, "even"), errors(r, "odd"), compiled(r), number(fraction(r, "even")), number(fraction(r, "large")), peer(r)]
        for r in results
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    text = [*introduction(results), *lines, "\n## Reasons\n"]
    for r in results:
        why = [first_problem(r)[:300]] if first_problem(r) else []
        if not fraction(r, "large") >= FULLY:
            why += reasons(r) or (["no attention over a sequence"] if largest(r, "u2").get("nothing_to_shard") else [])
        if state(r) == "ok" and worst_error(r) > TOLERANCE:
            why.append(f"error {worst_error(r):.0e}: the model attends in half precision, and `verify` allows what such a rounding makes")
        if compiled(r) == "error":
            why.append(f"torch.compile: {' '.join(r['variants']['even']['backend']['error'].split())[:200]}")
        if why:
            text += [f"- **{r['case']}** ({number(fraction(r, 'large'))})", *(f"    - {line}" for line in why)]
    return "\n".join(text) + "\n"
