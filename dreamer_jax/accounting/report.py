"""What a config costs, as one record for machines and as tables for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dreamer_jax.accounting.fit import (
    HEADROOM,
    changes_that_fit,
    largest_microbatch,
    share_of_memory,
    tokens_per_second,
    training_days,
)
from dreamer_jax.accounting.flops import forward_flops, generated_flops, training_flops
from dreamer_jax.accounting.hardware import GIB, Hardware
from dreamer_jax.accounting.match import Move
from dreamer_jax.accounting.memory import (
    compute_bytes,
    generation_memory,
    table_1_memory,
    training_memory,
)
from dreamer_jax.accounting.params import Count, active_parameters, exchanged_rows, parameters, stored_weights
from dreamer_jax.config import Config, ModelConfig
from dreamer_jax.dimensions.base import mean_context
from dreamer_jax.model_config import known_dimensions

GENERATED = 1024
"""Tokens of the generation that Table 1 averages over."""
PAPER_TOKENS = 100e9

Record = dict[str, Any]


def plan_record(config: Config, mesh: Mapping[str, int], device: Hardware, mfu: float) -> Record:
    """Parameters, FLOPs per token, bytes per device, whether it fits and, where a peak is known, how fast it may be."""
    model, devices = config.model, math.prod(mesh.values())
    memory = training_memory(config, mesh, device.platform)
    record: Record = {
        "name": config.name,
        "model": {"variant": model.variant, "depth": model.depth, "width": model.width}
        | _unshared_keys(model)
        | {"dimensions": {name: dict(vars(section)) for name, section in model.dimensions.items()}},
        "batch": {
            "rows": config.train.batch,
            "context": config.data.context,
            "microbatches": config.train.microbatches,
            "tokens": config.tokens_per_step,
            "dtype": config.train.dtype,
            "remat": config.train.remat,
        },
        "mesh": dict(mesh),
        "devices": devices,
        "parameters": _with_total(parameters(model)),
        "active_parameters": _with_total(active_parameters(model)),
        "flops_per_token": {
            "training": _with_total(training_flops(model, config.data.context)),
            "prefill": _with_total(forward_flops(model, mean_context(config.data.context))),
            "generated": _with_total(generated_flops(model, GENERATED)),
        },
        "training_memory": memory.by_component() | {"at_rest": memory.at_rest, "total": memory.total},
        "generation_memory": generation_memory(model, batch=1, length=GENERATED, size=compute_bytes(config))
        | {"table_1": table_1_memory(model, GENERATED)},
        "device": _on_device(config, mesh, device, mfu),
    }
    return record


def _unshared_keys(model: ModelConfig) -> Record:
    """Keys of the model's dimensions that no other dimension has: of EA its experts, but nobody's heads."""
    keys = [key for section in known_dimensions(model).values() for key in vars(section)]
    own = {key: value for section in model.dimensions.values() for key, value in vars(section).items()}
    return {key: value for key, value in own.items() if keys.count(key) == 1}


def _with_total(count: Count[Any]) -> dict[str, Any]:
    return count.by_component() | {"total": count.total}


def _on_device(config: Config, mesh: Mapping[str, int], device: Hardware, mfu: float) -> Record:
    share = share_of_memory(config, mesh, device.platform, device.memory)
    fits = share <= 1 - HEADROOM
    changes = [] if fits else changes_that_fit(config, mesh, device.platform, device.memory)
    return {
        "name": device.name,
        "memory": device.memory,
        "share": share,
        "fits": fits,
        "largest_microbatch": largest_microbatch(config, mesh, device.platform, device.memory),
        "changes": [
            {"overrides": list(change.overrides), "devices": change.devices, "share": change.share}
            for change in changes
        ],
    } | (_speed(config, math.prod(mesh.values()), device.peak, mfu) if device.peak else {})


def _speed(config: Config, devices: int, peak: float, mfu: float) -> Record:
    speed = tokens_per_second(config, devices, peak, mfu)
    return {
        "peak": peak,
        "mfu": mfu,
        "tokens_per_second": speed,
        "days_of_run": training_days(float(config.train.steps * config.tokens_per_step), speed),
        "days_of_100b_tokens": training_days(PAPER_TOKENS, speed),
    }


def match_record(moves: Sequence[Move]) -> list[Record]:
    """The turns of the matching solver."""
    return [
        {
            "moved": move.moved,
            "expert_width": move.config.ea.expert_width,
            "experts": move.config.ea.experts,
            "flops": move.flops,
            "flops_share": move.flops_share,
            "parameters": move.parameters,
            "parameters_share": move.parameters_share,
        }
        for move in moves
    ]


def compiled_record(config: Config, mesh: Mapping[str, int], platform: str, compiled: Any) -> Record:
    """XLA's figures of a `CompiledStep` beside the estimate, and what is sent beside the least that must be."""
    estimate = training_memory(config, mesh, platform)
    sent: dict[str, float] = {}
    for item in compiled.collectives:
        place = "in the depth loop" if item.in_loop else "once per step"
        # The program does not tell how much of a ragged buffer is filled.
        name = f"{item.kind}, {place}" + (" (at most)" if item.kind.startswith("ragged") else "")
        sent[name] = sent.get(name, 0.0) + item.sent
    return {
        "device_kind": compiled.device_kind,
        "seconds": compiled.seconds,
        "arguments": compiled.arguments,
        "estimated_arguments": estimate.at_rest,
        "temporaries": compiled.temporaries,
        "estimated_temporaries": estimate.temporary,
        "code": compiled.code,
        "flops_with_loops_once": compiled.flops,
        "sent": sent,
        "least": least_sent(config, mesh),
    }


def least_sent(config: Config, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one device must send in a step, however its program is written.

    Exchange: every token's row to A experts and back, forward and backward, at every depth, but for the share that
    stays at home. (Ours sends rows a second time in the backward pass rather than keep them at every depth: five
    crossings for these four.) Weights: every parameter gathered once in the compute type, experts over fsdp only.
    Gradients: as much in float32, and once over the copies. Shared experts have no gradient of their own (Eq. 8).
    """
    model, size = config.model, compute_bytes(config)
    tokens = config.tokens_per_step / math.prod(mesh.values())
    away = (mesh["expert"] - 1) / mesh["expert"]
    total = parameters(model).total
    experts = sum(layers * weight.size for weight, layers in stored_weights(model) if "expert" in weight.axes)
    shared = parameters(model).by_component().get("shared_experts", 0)
    shared_out = mesh["fsdp"] * mesh["expert"]
    gathered = (total - experts) * (shared_out - 1) / shared_out
    gathered += experts / mesh["expert"] * (mesh["fsdp"] - 1) / mesh["fsdp"]
    returned = gathered - shared * (shared_out - 1) / shared_out
    copies = mesh["data"]
    summed = 2 * total / shared_out * (copies - 1) / copies
    return {
        "token exchange": 4 * tokens * exchanged_rows(model) * model.width * size * away,
        "weights": size * gathered,
        "gradients": 4 * (returned + summed),
    }


# Tables


def show_plan(record: Record, console: Console) -> None:
    """Print a `plan_record`."""
    model, batch = record["model"], record["batch"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items())
    console.print(f"[bold]{record['name']}[/bold]: {model['variant']}, depth {model['depth']}, width {model['width']}")
    for name, keys in model["dimensions"].items():
        console.print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in keys.items()))
    console.print(
        f"{batch['rows']} rows of {batch['context']} tokens in {batch['microbatches']} microbatches, {batch['dtype']}, "
        f"remat {batch['remat']}; {record['devices']} device{'s' * (record['devices'] > 1)}: {mesh}\n"
    )
    console.print(_component_table(record))
    console.print(_memory_table(record))
    _show_device(record, console)


def _component_table(record: Record) -> Table:
    table = Table(title="per component", title_justify="left")
    for column in ("", "parameters", "active per token", "training", "prefill", "generated"):
        table.add_column(column, justify="left" if not column else "right")
    table.caption = f"FLOPs per token in millions; generated: mean over {GENERATED} tokens"
    flops = record["flops_per_token"]
    names = {**record["parameters"], **flops["training"]}
    names.pop("total")
    for name in (*names, "total"):
        stored, active = record["parameters"].get(name), record["active_parameters"].get(name)
        counts = [f"{n:,}" if n is not None else "" for n in (stored, active)]
        costs = [flops[kind].get(name) for kind in ("training", "prefill", "generated")]
        cells = [f"{cost / 1e6:,.2f}" if cost is not None else "" for cost in costs]
        table.add_row(name.replace("_", " "), *counts, *cells, style="bold" if name == "total" else None)
    return table


def _memory_table(record: Record) -> Table:
    device = record["device"]
    table = Table(title="memory of training, each device", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column(f"of {device['memory'] / GIB:.1f}", justify="right")
    for name, size in record["training_memory"].items():
        if size:
            style = "bold" if name == "total" else "dim" if name == "at_rest" else None
            table.add_row(name.replace("_", " "), f"{size / GIB:,.3f}", f"{size / device['memory']:.1%}", style=style)
    return table


def _show_device(record: Record, console: Console) -> None:
    device = record["device"]
    verdict = "[green]fits[/green]" if device["fits"] else "[red]does not fit[/red]"
    largest = device["largest_microbatch"]
    console.print(
        f"{verdict} {record['devices']} x {device['name']}: {device['share']:.0%} of the memory (up to "
        f"{1 - HEADROOM:.0%} counts as fitting); largest microbatch that fits: "
        + (f"{largest} row{'s' * (largest > 1)} a device" if largest else "none")
    )
    console.print(
        f"generation of {GENERATED} tokens, Table 1's rule: {record['generation_memory']['table_1'] / 1e9:.4f} GB"
    )
    for change in device["changes"]:
        devices = f"{change['devices']} device{'s' * (change['devices'] > 1)}"
        console.print(f"  fits with  {' '.join(change['overrides'])}  ({devices}, {change['share']:.0%})")
    if not device["fits"] and not device["changes"]:
        console.print("  no number of microbatches and no mesh of up to 64 times the devices makes it fit")
    if "peak" not in device:
        return
    console.print(
        f"at {device['mfu']:.0%} MFU (assumed) of {device['peak'] / 1e12:.0f} TFLOP/s: "
        f"{device['tokens_per_second']:,.0f} tokens/s; this run {device['days_of_run']:,.1f} days, "
        f"100B tokens {device['days_of_100b_tokens']:,.1f} days"
    )


def show_match(rows: Sequence[Record], name: str, baseline: str, console: Console) -> None:
    """Print a `match_record`."""
    table = Table(title=f"{name} sized after {baseline} (3.8)", title_justify="left")
    for column in ("searched over", "F", "E", "FLOPs per token", "", "parameters", ""):
        table.add_column(column, justify="right" if column != "searched over" else "left")
    for row in rows:
        table.add_row(
            row["moved"].replace("_", " "),
            str(row["expert_width"]),
            str(row["experts"]),
            f"{row['flops']:+,.0f}",
            f"{row['flops_share']:+.3%}",
            f"{row['parameters']:+,}",
            f"{row['parameters_share']:+.3%}",
        )
    table.caption = "differences from the baseline"
    console.print(table)


def show_compiled(record: Record, topology: str, console: Console) -> None:
    """Print a `compiled_record`."""
    table = Table(title=f"compiled for {topology} ({record['device_kind']})", title_justify="left")
    for column in ("bytes on each device", "estimate, GiB", "XLA, GiB", "estimate / XLA"):
        table.add_column(column, justify="left" if column.startswith("bytes") else "right")
    for name in ("arguments", "temporaries"):
        estimate, found = record[f"estimated_{name}"], record[name]
        table.add_row(name, f"{estimate / GIB:,.3f}", f"{found / GIB:,.3f}", f"{estimate / max(found, 1):.3f}")
    table.caption = (
        f"{record['seconds']:.0f} s; {record['flops_with_loops_once'] / 1e12:.2f} TFLOPs with each loop's body once"
    )
    console.print(table)
    table = Table(title="sent by each device in a step", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in record["sent"].items():
        table.add_row(name, f"{size / GIB:,.3f}")
    for name, size in record["least"].items():
        table.add_row(f"least: {name}", f"{size / GIB:,.3f}", style="dim")
    console.print(table)
