"""Print coverage results: one line per case for people watching, a Markdown table for the documentation."""

from typing import Any

Result = dict[str, Any]
TOLERANCE = 1e-5


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
    wrong = any(e.get("ok") is False for _, _, e in found) or any(e.get("trace_err", 0.0) > TOLERANCE for e in result["variants"].values())
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


def strategies(result: Result) -> str:
    """Attention strategies at u2r2 (large), folded."""
    for wanted in (("large", "u2r2"), ("even", "u2r2"), ("even", "u2")):
        for variant, mesh, e in entries(result):
            if (variant, mesh) == wanted and "attention" in e:
                counts: dict[str, int] = {}
                for a in e["attention"]:
                    counts[a["strategy"]] = counts.get(a["strategy"], 0) + a["count"]
                return ", ".join(f"{n} {s}" for s, n in counts.items())
    return ""


def reasons(result: Result) -> str:
    """Why work is replicated, most work first, at sequence-dominant size."""
    for variant, mesh, e in entries(result):
        if variant == "large" and mesh == "u2" and "replicated" in e:
            return "; ".join(f"{r['count']} {r['op']}: {r['reason']}" for r in e["replicated"][:3] if r["share"] > 0.005)
    return ""


def table(results: list[Result]) -> str:
    head = ["case", "state", "worst error", "sharded (tiny)", "sharded (large)", "attention", "replicated"]
    rows = [
        [r["case"], state(r), f"{worst_error(r):.1e}", f"{fraction(r, 'even'):.3f}", f"{fraction(r, 'large'):.3f}", strategies(r), reasons(r) or first_problem(r)[:120]]
        for r in results
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"
