"""The tables of ``tst plan`` on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from token_superposition.experiment.budget import Cost
from token_superposition.experiment.planning import Plan
from token_superposition.report.contents import short


def print_plan(plan: Plan, console: Console) -> None:
    shape = plan.shape
    active = f", {short(shape.active_parameters)} active" if shape.active_parameters < shape.parameters else ""
    console.print(
        f"{short(shape.parameters)} parameters{active} ({short(shape.body_parameters)} without embedding and head, "
        f"{short(shape.embedding_parameters)} in them), vocabulary {plan.vocab_size:,} ({plan.vocab_source})\n"
        f"{short(plan.latent_tokens_per_step)} latent tokens and {plan.flops_per_step:.3g} FLOPs a step",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(_costs(plan))
    console.print(_memory(plan))
    console.print(f"published tables, the nearest: {plan.published.table} (nats)", highlight=False)
    console.print(_published(plan))
    console.print(f"published runs of {plan.published.runs[0].model}", highlight=False)
    console.print(_runs(plan))
    for line in equal_loss(plan):
        console.print(line, highlight=False, soft_wrap=True)
    for label, lines in (("[yellow]warning[/yellow]", plan.warnings), ("[green]advice[/green]", plan.advice)):
        for line in lines:
            console.print(f"{label}: {line}", highlight=False, soft_wrap=True)


def _costs(plan: Plan) -> Table:
    table = _table("", "this run", "baseline")

    def row(name: str, what: str) -> None:
        def text(cost: Cost) -> str:
            value = getattr(cost, what)
            return f"{value:,}" if "steps" in what else f"{value:.3g}" if what == "flops" else short(value)

        table.add_row(name, text(plan.run), text(plan.baseline))

    row("steps", "steps")
    row("of them superposed", "superposed_steps")
    row("latent tokens", "latent_tokens")
    row("raw tokens", "raw_tokens")
    table.add_row("their storage", gb(plan.run.data_bytes), gb(plan.baseline.data_bytes))
    row("FLOPs", "flops")
    hours = f"{plan.gpu_type}-hours at an MFU of {plan.mfu:.0%}"
    table.add_row(hours, f"{plan.run.gpu_hours:,.1f}", f"{plan.baseline.gpu_hours:,.1f}")
    table.add_row(f"days on {plan.gpus} x {plan.gpu_type}", f"{plan.run.days:,.2f}", f"{plan.baseline.days:,.2f}")
    if plan.checkpoints:
        counts = (plan.checkpoints, plan.baseline_checkpoints)
        table.add_row("checkpoints", *(f"{n} x {gb(plan.checkpoint_bytes)}" for n in counts))
    return table


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = _table(f"memory of a GPU, micro-batch {plan.micro_batch}", "", "checkpointed")
    for name in ("weights", "gradients", "optimizer", "gathered"):
        table.add_row(name, gb(getattr(memory, name)), gb(getattr(memory, name)))
    table.add_row("activations", gb(memory.activations), gb(memory.activations_checkpointed))
    whole = f"loss (whole logits: {gb(memory.loss_whole_logits)})"
    table.add_row(whole, gb(memory.loss), gb(memory.loss))
    limit = f"total (usable on {plan.gpu_type}: {gb(plan.memory_limit)})"
    table.add_row(limit, gb(memory.total), gb(memory.total_checkpointed))
    return table


def _published(plan: Plan) -> Table:
    published = plan.published
    table = _table("", "s", "r", "raw tokens", "loss", "gain")
    table.add_row("baseline", "1", "0", short(plan.run.latent_tokens), f"{published.baseline_loss:.4f}", "")
    cells = {
        "best": published.best,
        "about as good, least text": published.frugal,
        "best within the tokens": published.within_data,
    }
    for name, cell in cells.items():
        if cell is not None:
            raw = short(round(cell.raw_per_latent * plan.run.latent_tokens))
            table.add_row(name, str(cell.bag_size), f"{cell.ratio:g}", raw, f"{cell.loss:.4f}", f"{cell.gain:.4f}")
    gain = "not in the table" if published.gain is None else f"{published.gain:.4f}"
    s, r = str(published.bag_size), f"{published.ratio:.3g}"
    table.add_row("this run", s, r, short(plan.run.raw_tokens), "", gain)
    return table


def _runs(plan: Plan) -> Table:
    published = plan.published
    table = _table("", "steps", "s", "raw tokens", "B200-hours", "MFU", "loss", "gain")
    for run, gain, mfu in zip(published.runs, published.run_gains, published.mfu, strict=True):
        superposed = run.superposed_steps > 0
        table.add_row(
            "TST" if superposed else "baseline",
            f"{run.steps:,}" + (f" ({run.superposed_steps:,})" if superposed else ""),
            str(run.bag_size),
            short(run.raw_tokens),
            f"{run.b200_hours:,g}",
            f"{mfu:.0%}" if mfu is not None else "",
            f"{run.final_loss:.3f}",
            f"{gain:.3f}" if gain is not None else "",
        )
    return table


def equal_loss(plan: Plan) -> list[str]:
    """What the published baselines cost that end at the loss of a published run with TST."""
    lines: list[str] = []
    for run, hours in zip(plan.published.runs, plan.published.baseline_hours, strict=True):
        if hours is not None:
            low, high = hours
            least = low / run.b200_hours
            needs, speedup = f"more than {low:,g}", f"more than {least:.2f}"
            if high is not None:
                needs, speedup = f"{low:,g} to {high:,g}", f"{least:.2f} to {high / run.b200_hours:.2f}"
            lines.append(
                f"to TST's loss of {run.final_loss:.3f}, {run.b200_hours:,g} B200-hours, the baseline takes {needs}: "
                f"a speed-up to equal loss of {speedup} (by these runs, one each)"
            )
    return lines


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    return table


def gb(n: int | float) -> str:
    """Decimal units, as data sheets count."""
    return f"{n / 1e12:.2f} TB" if n >= 1e12 else f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
