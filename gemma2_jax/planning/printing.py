"""Tables for the terminal: plans, searches and placements."""

from collections.abc import Callable

from rich import box, table
from rich.console import Console
from rich.text import Text

from gemma2_jax.planning.count import ProgramCost
from gemma2_jax.planning.decoding_plan import DecodingPlan, Phase
from gemma2_jax.planning.memory import in_units
from gemma2_jax.planning.placement import PlacedModel, Placement
from gemma2_jax.planning.plan import Plan
from gemma2_jax.planning.roofline import Bounds
from gemma2_jax.planning.search import SearchResult
from gemma2_jax.planning.topologies import Topology


def print_plan(plan: Plan, console: Console) -> None:
    """Prints a plan; estimates are marked as such."""
    verdict = "fits" if plan.fits else "does not fit"
    style = "bold green" if plan.fits else "bold red"
    _print_line(console, f"{plan.name} on {plan.topology.name} {verdict}.", style)
    grid = table.Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _rows(plan):
        grid.add_row(Text(name), Text(value))
    console.print(grid)
    if plan.help:
        _print_line(console, "What would help:")
        for suggestion in plan.help:
            _print_line(console, f"  {suggestion}")


def _rows(plan: Plan) -> list[tuple[str, str]]:
    memory, capacity = plan.program.memory, plan.topology.capacity
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    temp = "unknown" if memory.temp is None else in_units(memory.temp)
    rows = [
        ("devices", f"{plan.devices}, mesh {mesh}"),
        (
            "memory per device",
            f"{in_units(memory.peak)} of {in_units(capacity)} ({memory.peak / capacity:.0%})",
        ),
        ("  arguments, temporaries", f"{in_units(memory.argument)}, {temp}"),
        ("  parameters", in_units(plan.parts.parameters)),
        *_by_run(plan),
        ("  moments", in_units(plan.parts.moments)),
        *([("  averaged weights", in_units(plan.parts.averaged))] if plan.parts.averaged else []),
        ("  gradients", in_units(plan.parts.gradients)),
        *_base(plan),
        ("  teacher", in_units(plan.parts.teacher)),
        ("  saved activations", f"{in_units(plan.parts.activations)} (estimate)"),
        ("  logits of a block", f"{in_units(plan.parts.logits)} (estimate)"),
        *_not_in_step(plan),
        ("compiled in", f"{plan.program.seconds:.0f} s"),
        ("tokens per step", f"{plan.tokens:,}"),
        ("model FLOPs per step", f"{plan.model_flops:.3e} (formula: PaLM, arXiv 2204.02311, appendix B)"),
    ]
    return rows + _counted(plan) + _estimated(plan)


def _base(plan: Plan) -> list[tuple[str, str]]:
    """A row about the frozen weights of the trained models; none if all weights are trained."""
    if not plan.parts.base:
        return []
    trained = sum(plan.trained.values())
    return [("  frozen base", f"{in_units(plan.parts.base)} (of the parameters, {trained:,} are trained)")]


def _by_run(plan: Plan) -> list[tuple[str, str]]:
    """Rows about the parameters of each run; none for a single run."""
    if len(plan.parameters) == 1:
        return []
    return [
        (f"    {name}", f"{in_units(plan.parts.parameters_by_run[name])} ({count:,} parameters)")
        for name, count in plan.parameters.items()
    ]


def _not_in_step(plan: Plan) -> list[tuple[str, str]]:
    """Rows about host memory, and about what the planned step leaves out."""
    rows = []
    if plan.program.memory.host:
        rows.append(("  in the host's memory", in_units(plan.program.memory.host)))
    if plan.validating:
        rows.append(("  validation teacher", f"{in_units(plan.validating)}, in addition, during evaluations"))
    if plan.collects:
        rows.append(
            (
                "  not planned",
                "the program that makes batches, such as on-policy sampling with its key/value cache",
            )
        )
    return rows


def _counted(plan: Plan) -> list[tuple[str, str]]:
    cost = plan.cost
    if cost is None:
        return []
    rows = [
        (
            "program per device",
            f"{cost.flops:.3e} FLOPs of products, {in_units(cost.bytes)} of memory traffic",
        ),
    ]
    if plan.kernel_flops:
        rows.append(("  attention in addition", f"{plan.kernel_flops:.3e} FLOPs (estimate by formula)"))
    if cost.uncounted:
        rows.append(("  loops", f"{cost.uncounted} without a trip count, counted once"))
    for (kind, axes), amount in sorted(cost.sent.items(), key=lambda item: -item[1]):
        if axes:
            rows.append((f"  sent along {'+'.join(axes)}", f"{in_units(amount)}, {kind}"))
    return rows


def _estimated(plan: Plan) -> list[tuple[str, str]]:
    found = plan.bounds
    if found is None:
        return []
    rows = [(f"minimum time by {name}", f"{seconds:.4f} s (estimate)") for name, seconds in found.all.items()]
    speed = plan.tokens / found.seconds
    return [
        *rows,
        (
            "minimum time of a step",
            f"{found.seconds:.4f} s, bound by {found.binding}: at most {speed:,.0f} tokens/s, "
            f"MFU {plan.utilisation:.0%} (estimate)",
        ),
    ]


def print_decoding(plan: DecodingPlan, console: Console) -> None:
    """Prints the plan of generation; times are marked as estimates."""
    verdict, style = ("fits", "bold green") if plan.fits else ("does not fit", "bold red")
    rows = f"{plan.batch:,} x {plan.context:,} positions"
    _print_line(
        console, f"{plan.name} in {plan.weights_in} on {plan.topology.name}, {rows}, {verdict}.", style
    )
    grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("per device", "prefill", "decoding of a token"):
        grid.add_column(name, justify="left" if name == "per device" else "right")
    capacity, phases = plan.topology.capacity, (plan.prefill, plan.decode)
    grid.add_row("weights", *[in_units(plan.weights)] * 2)
    grid.add_row(f"keys and values, {plan.cache_in}", *[in_units(plan.cache)] * 2)
    grid.add_row(
        "temporaries",
        *("unknown" if phase.memory.temp is None else in_units(phase.memory.temp) for phase in phases),
    )
    grid.add_row(
        f"memory, of {in_units(capacity)}",
        *(f"{in_units(phase.memory.peak)} ({phase.memory.peak / capacity:.0%})" for phase in phases),
    )
    for name, cell in _DECODING_CELLS.items():
        grid.add_row(name, *(_cell(phase, cell) for phase in phases))
    if any(phase.cost is not None and phase.cost.uncounted for phase in phases):
        grid.add_row(
            "loops counted once",  # since the program does not state how often they run
            *(_cell(phase, lambda phase, cost, least: str(cost.uncounted)) for phase in phases),
        )
    console.print(grid)
    _print_line(
        console, f"A token reads at least {in_units(plan.ideal)}: all weights, keys and values once.", "dim"
    )
    _print_line(
        console, "Times are estimates: bounds from data-sheet peaks, which no real step reaches.", "dim"
    )


_DECODING_CELLS: dict[str, Callable[[Phase, ProgramCost, Bounds], str]] = {
    "FLOPs of products": lambda phase, cost, least: f"{cost.flops:.3e}",
    "memory traffic": lambda phase, cost, least: in_units(round(cost.bytes)),
    "minimum time": lambda phase, cost, least: f"{1000 * least.seconds:,.2f} ms, by {least.binding}",
    "tokens/s at most": lambda phase, cost, least: f"{phase.tokens / least.seconds:,.0f}",
}


def _cell(phase: Phase, cell: Callable[[Phase, ProgramCost, Bounds], str]) -> str:
    return "" if phase.cost is None or phase.bounds is None else cell(phase, phase.cost, phase.bounds)


def _print_line(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style), soft_wrap=True)


def print_search(found: SearchResult, topology: Topology, console: Console) -> None:
    """Prints the plans that a search compiled, best first, and the overrides of the best one."""
    grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("fits", "peak GiB", "step s", "bound by", "MFU"):
        grid.add_column(name, justify="right")
    grid.add_column("overrides", overflow="fold")
    for candidate, plan in found.plans:
        least = plan.bounds
        cells = ["yes" if plan.fits else "no", f"{plan.program.memory.peak / 2**30:.2f}"]
        if least is None:
            cells += ["", "", ""]
        else:
            cells += [f"≥ {least.seconds:.4f}", least.binding, f"≤ {plan.utilisation:.0%}"]
        grid.add_row(*(Text(cell) for cell in (*cells, _short(candidate.overrides))))
    _print_line(
        console,
        f"Candidates tried on {topology.name}: {len(found.plans)}; left when the budget was spent: {found.left}.",
        "bold",
    )
    console.print(grid)
    _print_line(
        console, "Times and MFU are estimates: bounds from data-sheet peaks, which no real step reaches."
    )
    candidate, best = found.plans[0]
    if best.fits:
        _print_line(console, f"Best: {candidate.overrides}", "bold green")
    else:
        _print_line(console, "None of the candidates tried fits.", "bold red")


def _short(overrides: str) -> str:
    """Leaves out mesh axes of size 1."""
    return " ".join(
        text for text in overrides.split() if not (text.startswith("mesh.") and text.endswith("=1"))
    )


def print_placement(placement: Placement, console: Console) -> None:
    """Prints for each model how its weights and activations are split, and the size of each device's shards."""
    shape = {axis: size for axis, size in placement.mesh.items() if size > 1}
    mesh = " x ".join(f"{axis}={size}" for axis, size in shape.items()) or "one device"
    _print_line(console, f"{placement.name} on {placement.topology}, mesh {mesh}", "bold")
    for model in placement.models:
        console.print(_weights_table(model, shape))
        if model.role.split()[0] in ("student", "adapter"):
            _print_line(
                console,
                "Gradients and the optimizer's two moments are split like these weights, and each is as large.",
            )
        letters: dict[tuple[str, ...], list[str]] = {}
        for letter, axes in model.activations.items():
            letters.setdefault(axes, []).append(letter)
        split = "; ".join(f"{', '.join(dims)} along {_axes(axes, shape)}" for axes, dims in letters.items())
        _print_line(console, f"Activations of the {model.role}: {split or 'not split'}.")
        if model.head:
            _print_line(
                console,
                f"LM head of the {model.role}: V along {_axes(model.head, shape)}; tokens along their remaining axes.",
            )


def _weights_table(model: PlacedModel, shape: dict[str, int]) -> table.Table:
    grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column(f"weight of the {model.role}", no_wrap=True)
    grid.add_column("size", no_wrap=True)
    grid.add_column("split along")
    grid.add_column("per device", justify="right", no_wrap=True)
    for weight in model.weights:
        size = " ".join(f"{letter}{length}" for letter, length in weight.sizes.items())
        split = ", ".join(f"{letter}: {_axes(axes, shape)}" for letter, axes in weight.axes.items())
        cells = weight.path, size, split or "not split", in_units(weight.device_bytes)
        grid.add_row(*map(Text, cells))
    grid.add_section()
    total = sum(weight.device_bytes for weight in model.weights)
    grid.add_row("all", "", "", Text(in_units(total)))
    return grid


def _axes(axes: tuple[str, ...], shape: dict[str, int]) -> str:
    return " x ".join(f"{axis} ({shape[axis]})" for axis in axes)
