"""How parameters, FLOPs, memory and bytes sent grow: the figure and the tables of docs/scaling.md.

    python benchmarks/scaling.py [--figure docs/scaling.png] [--compile]

All but --compile is arithmetic on configs (dreamer_jax.accounting), seconds on any machine. --compile builds the train
step of configs/tiny.py for eight simulated CPU devices and counts what it sends. The figure needs the extra "figures".
"""

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dreamer_jax.accounting.flops import generated_flops, score_gradient_flops, training_flops
from dreamer_jax.accounting.hardware import GIB
from dreamer_jax.accounting.match import match
from dreamer_jax.accounting.memory import SINGLE, compute_bytes, table_1_memory, training_memory
from dreamer_jax.accounting.params import exchanged_rows, parameters
from dreamer_jax.config import Config, load

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TABLE_1 = {  # parameters in billions, GFLOPs for a generated token, GB
    "la_1b": (1.1708, 0.9389, 4.7827),
    "dr_1b": (1.1704, 0.9389, 4.7822),
    "dr_da_1b": (1.1708, 0.9413, 4.7839),
    "la_2b": (2.0790, 1.6150, 6.6337),
    "dr_2b": (2.0794, 1.6199, 6.6343),
    "dr_da_2b": (2.0788, 1.6130, 6.6349),
}
AT_1B = ("la_1b", "dr_1b", "dr_da_1b")


def paper(name: str) -> Config:
    return load(CONFIGS / f"{name}.py")


def one_row(config: Config, **train) -> Config:
    """The config with microbatches of one row on a single device."""
    return replace(config, train=replace(config.train, **{"batch": 256, "microbatches": 256, **train}))


def mesh_of(data: int = 1, fsdp: int = 1, expert: int = 1) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "expert": expert}


def sent(config: Config, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one device sends in a step of training/step.py, rows padded by no transport and experts by no kernel.

    token exchange: each token's rows to A experts; x there and back forward, x and the cotangent of y there and that of
    x back in the backward pass. weights: at_work of sharding.py. gradients: its transpose, and the sum over data; that
    of a shared expert is the sum of the routed ones' and does not travel.
    """
    size, count = compute_bytes(config), parameters(config.model)
    of_experts, shared_experts = (count.components.get(name, 0) for name in ("ea_experts", "shared_experts"))
    tokens = config.tokens_per_step / math.prod(mesh.values())
    away = {axis: (devices - 1) / devices for axis, devices in mesh.items()}
    shared_out = mesh["fsdp"] * mesh["expert"]
    whole, experts = (shared_out - 1) / shared_out, away["expert"] / shared_out + away["fsdp"] / mesh["expert"]
    weights = (count.total - of_experts) * whole + of_experts * experts
    summed = 2 * (count.total - shared_experts) / shared_out * away["data"]
    return {
        "token exchange": 5 * tokens * exchanged_rows(config.model) * config.model.width * size * away["expert"],
        "weights": size * weights,
        "gradients": 4 * (weights - shared_experts * whole + summed),
    }


# Tables


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_table_1() -> None:
    rows = []
    for name, (billions, gflops, gigabytes) in TABLE_1.items():
        model = paper(name).model
        ours = parameters(model).total / 1e9, generated_flops(model).total / 1e9, table_1_memory(model) / 1e9
        cells = [
            f"{mine:.4f} | {theirs:.4f} | {mine / theirs - 1:+.2%}"
            for mine, theirs in zip(ours, (billions, gflops, gigabytes), strict=True)
        ]
        rows.append([name, *cells])
    columns = ["", "B parameters", "Table 1", "", "GFLOPs", "Table 1", "", "GB", "Table 1", ""]
    table("Six configs against Table 1", columns, rows)


def print_matching() -> None:
    rows = []
    for baseline in ("la_1b", "la_2b"):
        for variant in ("dr", "dr_da"):
            given = paper(f"{variant}_{baseline[-2:]}").model
            moves = match(given, paper(baseline).model)
            walk = ", ".join(f"{m.config.ea.expert_width}/{m.config.ea.experts}" for m in moves)
            last = moves[-1]
            theirs = f"{given.ea.expert_width}/{given.ea.experts}"
            rows.append(
                [
                    f"{variant}_{baseline[-2:]}",
                    walk,
                    theirs,
                    f"{last.flops_share:+.3%}",
                    f"{last.parameters_share:+.3%}",
                ]
            )
    table("Matching: F/E after each turn", ["", "turns", "Table 3", "FLOPs", "parameters"], rows)


def costs(config: Config) -> dict[str, float]:
    memory = training_memory(one_row(config), SINGLE, "tpu")
    return {
        "parameters": parameters(config.model).total,
        "training FLOPs": training_flops(config.model, config.data.context).total,
        "at rest": memory.at_rest,
        "temporaries": memory.temporary,
        "token exchange": sent(config, mesh_of(expert=8))["token exchange"],
    }


def doubled(config: Config) -> dict[str, Config]:
    """One letter twice as large, the number of tokens in a step unchanged."""
    model = config.model
    changed = {
        "L": replace(model, depth=2 * model.depth),
        "D": replace(model, width=2 * model.width),
        "E": replace(model, ea=replace(model.ea, experts=2 * model.ea.experts)),
        "A": replace(model, ea=replace(model.ea, active_experts=2 * model.ea.active_experts)),
        "F": replace(model, ea=replace(model.ea, expert_width=2 * model.ea.expert_width)),
    }
    longer = replace(config, data=replace(config.data, context=2 * config.data.context))
    return {letter: replace(config, model=m) for letter, m in changed.items()} | {
        "T": replace(longer, train=replace(config.train, batch=config.train.batch // 2))
    }


def print_doubling() -> None:
    rows = []
    for name in AT_1B:
        config = paper(name)
        base = costs(config)
        for letter, changed in doubled(config).items():
            rows.append([name, f"2 {letter}", *(f"{costs(changed)[key] / base[key]:.2f}" for key in base)])
    table("One letter doubled: times what it was", ["", "", *costs(paper("la_1b"))], rows)


def print_depth() -> None:
    rows = []
    for name in AT_1B:
        for depth in (8, 16, 32, 64):
            config = at_depth(paper(name), depth)
            memory = [training_memory(one_row(config, remat=r), SINGLE, "tpu").total for r in POLICIES]
            figures = [
                parameters(config.model).total / 1e9,
                training_flops(config.model, config.data.context).total / 1e9,
            ]
            rows.append(
                [name, str(depth), f"{figures[0]:.3f}", f"{figures[1]:.3f}", *(f"{size / GIB:.1f}" for size in memory)]
            )
    columns = ["", "L", "B parameters", "training GFLOPs per token", *(f"GiB, {policy}" for policy in POLICIES)]
    table("Depth alone, one row of 4096 tokens on one device", columns, rows)


def print_context() -> None:
    rows = []
    for context in (1024, 4096, 16384, 65536):
        flops = [training_flops(paper(name).model, context) for name in ("la_2b", "dr_da_2b")]
        cells = [f"{count.total / 1e9:.2f} | {count.components['sa_attention'] / count.total:.0%}" for count in flops]
        rows.append([f"{context:,}", *cells])
    columns = ["T", "la_2b", "of it SA's scores", "dr_da_2b", "of it SA's scores"]
    table("Training GFLOPs per token against context", columns, rows)
    extra = {name: score_gradient_flops(paper(name).model) / 1e9 for name in ("dr_2b", "dr_da_2b")}
    print(f"\nscore gradients, GFLOPs per token: {', '.join(f'{name} {flops:.3f}' for name, flops in extra.items())}")


MESHES = (mesh_of(8), mesh_of(fsdp=8), mesh_of(expert=8), mesh_of(32, 8), mesh_of(32, 1, 8), mesh_of(256))


def print_meshes() -> None:
    for name in ("la_2b", "dr_da_2b"):
        config = paper(name)
        rows = []
        for mesh in MESHES:
            devices = math.prod(mesh.values())
            split = replace(config, train=replace(config.train, microbatches=config.train.batch // devices))
            memory, bytes_sent = training_memory(split, mesh, "tpu"), sent(split, mesh)
            rows.append([
                " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1),
                f"{memory.at_rest / 1e9:.1f}", f"{memory.total / 1e9:.1f}",
                *(f"{bytes_sent[key] / 1e9:.2f}" for key in bytes_sent), f"{sum(bytes_sent.values()) / 1e9:.2f}",
            ])  # fmt: skip
        columns = ["mesh", "at rest", "in a step", "sent: tokens", "weights", "gradients", "all"]
        table(f"{name}, 256 rows of 4096, one row at a time: GB on and from each device", columns, rows)
    per_token = sent(config, mesh_of(expert=8))["token exchange"] * 8 / config.tokens_per_step
    flops = training_flops(config.model, config.data.context).total
    print(f"\n{name}, expert 8: {per_token / 1e6:.2f} MB sent per token, {flops / per_token:,.0f} FLOPs for each byte")


def print_compiled() -> None:
    """What the compiled step of configs/tiny.py sends on eight simulated devices, beside `sent`."""
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from dreamer_jax import sharding
    from dreamer_jax.kernels.compute import Compute
    from dreamer_jax.kernels.exchange import SLACK
    from dreamer_jax.training.ahead_of_time import abstract_batch
    from dreamer_jax.training.collectives import collectives
    from dreamer_jax.training.step import abstract_state, make_train_step

    shape, rows = mesh_of(2, 2, 2), []
    tiny = load(CONFIGS / "tiny.py")
    tiny = replace(
        tiny, mesh=replace(tiny.mesh, **shape), train=replace(tiny.train, batch=16, microbatches=2, remat="full")
    )
    for recurrent, mixture in ((False, ("sa", "ea")), (True, ("da+sa", "ea"))):
        model = replace(tiny.model, depth_recurrent=recurrent, mixture=mixture)
        config = replace(tiny, model=model)
        mesh = sharding.make_mesh(config.mesh, jax.devices())
        graph, state = abstract_state(config, mesh)
        step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
        found = collectives(step.lower(state, abstract_batch(config, mesh)).compile().as_text())
        ours = sent(config, shape)
        inside = sum(c.sent for c in found if c.in_loop)
        outside = sum(c.sent for c in found if not c.in_loop)
        exchange, once = ours["token exchange"] * SLACK["all_to_all"], ours["weights"] + ours["gradients"]
        for place, mine, theirs in (("depth loop", exchange, inside), ("once per step", once, outside)):
            rows.append([model.variant, place, f"{mine / 1e6:.3f}", f"{theirs / 1e6:.3f}", f"{mine / theirs:.3f}"])
    columns = ["configs/tiny.py, data 2 x fsdp 2 x expert 2", "", "formula, MB", "compiled program", "ratio"]
    table("Sent by each device in a step", columns, rows)


# The figure

POLICIES = ("full", "selective", "none")
COLOURS = {"LA": "#0072B2", "DR": "#E69F00", "DR+DA": "#009E73"}  # Okabe and Ito's, told apart by the colour-blind
MARKERS = {"LA": "o", "DR": "s", "DR+DA": "^"}
DEPTHS = (4, 8, 16, 24, 32, 48, 64)


def at_depth(config: Config, depth: int) -> Config:
    """Depth alone changes (and with it M, the number of attention experts)."""
    return replace(config, model=replace(config.model, depth=depth))


def draw(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 6.8), layout="constrained")
    _draw_parameters(axes[0, 0])
    _draw_flops(axes[0, 1])
    _draw_memory(axes[1, 0])
    _draw_sent(axes[1, 1])
    for letter, ax in zip("abcd", axes.flat, strict=True):
        ax.set_title(f"{letter}  {ax.get_title()}", loc="left", fontweight="bold", fontsize=9.5)
        ax.set_title("")
        ax.set_axisbelow(True)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_ylim(bottom=0 if ax.get_yscale() == "linear" else None)
    for ax in axes.flat[:3]:
        ax.set_xlabel("depth L")
        ax.set_xticks((4, 16, 32, 48, 64))
    figure.savefig(file, dpi=110)
    print(f"\nwrote {file}")


def _draw_parameters(ax) -> None:
    ax.set_title("parameters, depth alone changed")
    for name in AT_1B:
        config = paper(name)
        variant = config.model.variant
        counts = [parameters(at_depth(config, depth).model).total / 1e9 for depth in DEPTHS]
        hollow = {"markerfacecolor": "white", "markersize": 9} if variant == "DR" else {"markersize": 4.5}
        ax.plot(DEPTHS, counts, color=COLOURS[variant], marker=MARKERS[variant], label=variant, **hollow)
    ax.set_ylabel("billions")
    ax.legend(frameon=False)


def _draw_flops(ax) -> None:
    ax.set_title("training FLOPs per token, DR+DA, T = 4096")
    config = paper("dr_da_1b")
    counts = [training_flops(at_depth(config, depth).model, config.data.context).by_component() for depth in DEPTHS]
    groups = {
        "LM head": ("lm_head",),
        "EA experts": ("ea_experts",),
        "SA projections": ("sa_projections",),
        "SA scores, values": ("sa_attention",),
        "DA": ("da_projections", "da_attention"),
        "routers": ("attention_routers", "ea_router"),
    }
    sums = [[sum(count[part] for part in parts) / 1e9 for count in counts] for parts in groups.values()]
    colours = ("#BBBBBB", "#009E73", "#56B4E9", "#0072B2", "#E69F00", "#CC79A7")
    ax.stackplot(DEPTHS, sums, labels=groups, colors=colours, edgecolor="white", linewidth=0.6)
    la = paper("la_1b")
    totals = [training_flops(at_depth(la, depth).model, la.data.context).total / 1e9 for depth in DEPTHS]
    ax.plot(DEPTHS, totals, color="black", linestyle="--", linewidth=1.4, label="LA, all")
    ax.set_ylabel("GFLOPs per token")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, loc="upper left")


def _draw_memory(ax) -> None:
    ax.set_title("training memory, one device, one row of 4096")
    styles = dict(zip(POLICIES, ("-", "--", ":"), strict=True))
    for name in ("la_1b", "dr_da_1b"):
        config = paper(name)
        variant = config.model.variant
        for policy in POLICIES:
            sizes = [
                training_memory(one_row(at_depth(config, depth), remat=policy), SINGLE, "tpu").total / GIB
                for depth in DEPTHS
            ]
            label = f"{variant}, remat {policy}"
            ax.plot(DEPTHS, sizes, styles[policy], color=COLOURS[variant], marker=MARKERS[variant], markersize=4.5,
                    label=label)  # fmt: skip
    ax.set_ylabel("GiB")
    ax.legend(frameon=False, loc="upper left")


def _draw_sent(ax) -> None:
    ax.set_title("sent by each device in a step, DR+DA 2B")
    config = paper("dr_da_2b")
    devices = (8, 16, 32, 64, 128, 256)
    meshes = {
        "data n": (lambda n: mesh_of(data=n), "#999999", "D"),
        "fsdp n": (lambda n: mesh_of(fsdp=n), "#E69F00", "s"),
        "data n/8 x fsdp 8": (lambda n: mesh_of(n // 8, 8), "#56B4E9", "v"),
        "data n/8 x expert 8": (lambda n: mesh_of(n // 8, 1, 8), "#CC79A7", "o"),
    }
    for label, (shape, colour, marker) in meshes.items():
        totals = [sum(sent(config, shape(n)).values()) / 1e9 for n in devices]
        ax.plot(devices, totals, color=colour, marker=marker, markersize=4.5, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(devices, [str(n) for n in devices])
    ax.set_yticks((5, 10, 20, 50, 100, 200), ["5", "10", "20", "50", "100", "200"])
    ax.minorticks_off()
    ax.set_xlabel("devices n")
    ax.set_ylabel("GB")
    ax.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="where to draw; nothing is drawn without it")
    parser.add_argument("--compile", action="store_true", help="count what a compiled step sends (two minutes)")
    arguments = parser.parse_args()
    print_table_1()
    print_matching()
    print_doubling()
    print_depth()
    print_context()
    print_meshes()
    if arguments.compile:
        print_compiled()
    if arguments.figure:
        draw(arguments.figure)


if __name__ == "__main__":
    main()
