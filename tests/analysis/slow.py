"""Captures computed token by token from everything that a model computes, to compare the streamed ones with."""

import numpy as np

from dreamer_jax.analysis.readouts import SAME, THRESHOLDS, thresholds
from dreamer_jax.convert import named_arrays
from dreamer_jax.model.dreamer import Capture, Dreamer


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + epsilon) * weight


def captures(model: Dreamer, seen: Capture, tokens, segment_ids, depth: int) -> dict[str, np.ndarray]:
    """Everything of a pass over sequences but "moments"."""
    places = list(zip(*np.nonzero(segment_ids > 0), strict=True))
    T = tokens.shape[1]
    judged = [(b, t) for b, t in places if t + 1 < T and segment_ids[b, t + 1] == segment_ids[b, t]]
    found = {"tokens": np.array(len(places)), "positions": np.array(len(judged))}
    found |= routing(model, seen, places, depth) | attention(model, seen, places, depth)
    found |= residual(seen, places, depth) | readouts(model, seen, tokens, judged, depth)
    return found


def routing(model, seen, places, depth):
    found, config = {}, model.config
    biases = {name: array for name, array in named_arrays(model).items() if name.endswith("router.bias")}
    for name, ids in seen.experts.items():
        E, A = seen.router_logits[name].shape[-1], ids.shape[-1]
        counts, together = np.zeros((depth, E), np.int64), np.zeros((depth, E, E), np.int64)
        entropy, margin = np.zeros(depth), np.zeros(depth)
        for l in config.depths_of(name, depth):
            layer = "layer" if config.depth_recurrent else f"layers.{l}"
            bias = np.asarray(biases[f"{layer}.{name}.router.bias"])
            for b, t in places:
                chosen = ids[l, b, t]
                for i in chosen:
                    counts[l, i] += 1
                    for j in chosen:
                        together[l, i, j] += 1
                logits = np.asarray(seen.router_logits[name][l, b, t], np.float64)
                p = 1 / (1 + np.exp(-logits))
                p /= p.sum()
                entropy[l] -= np.sum(p * np.log(p)) / len(places)
                ranked = np.sort(logits + bias)[::-1]
                margin[l] += (ranked[A - 1] - ranked[A]) / len(places)
        idle = [l for l in range(depth) if l not in config.depths_of(name, depth)]
        entropy[idle] = margin[idle] = np.nan
        found |= {f"experts/{name}/counts": counts}
        found |= {f"experts/{name}/entropy": entropy, f"experts/{name}/margin": margin}
        if A > 1 and config.depth_recurrent:
            found[f"experts/{name}/together"] = together.sum(axis=0)
        elif A > 1:
            found[f"experts/{name}/together_per_depth"] = together
    return found


def attention(model, seen, places, depth):
    found = {}
    for name, maps in seen.attention.items():
        runs = model.config.depths_of(name, depth)
        weight = np.full((depth, *np.shape(maps)[3:]), np.nan)
        for l in runs:
            weight[l] = np.mean([maps[l, b, t] for b, t in places], axis=0)
        found[f"attention/{name}/weight"] = weight
        moved = np.full(weight.shape, np.nan)
        for l in runs:
            moved[l] = np.mean([maps[l, b, t] * value_norms(model, seen, name, b, t, depth) for b, t in places], axis=0)
        found[f"attention/{name}/weighted_norm"] = moved
        found[f"attention/{name}/visible"] = np.nan_to_num(weight).sum(axis=1) > 0
    return found


def value_norms(model, seen, name, b, t, depth):
    """[N, S]: of what each head finds at each entry; DA's values are made at each depth by the chosen expert."""
    weights, config = named_arrays(model), model.config
    section = getattr(config, name)
    N, K, H = section.query_heads, section.kv_heads, section.head_size
    norms = []
    if name == "latent":
        values = np.asarray(weights["layer.latent.values"]).reshape(-1, K, H)
        return np.repeat(np.linalg.norm(values, axis=-1).T, N // K, axis=0)
    for l in range(depth):
        if l not in config.depths_of(name, depth):
            norms.append(np.zeros(N))
            continue
        x = rms_norm(np.asarray(seen.hidden)[l, b, t], np.asarray(weights["layer.da.norm"]), config.norm_epsilon)
        expert, score = seen.experts[name][l, b, t, 0], seen.scores[name][l, b, t, 0]
        matrix = np.asarray(weights["layer.da.w_qkv"])[expert] + np.asarray(weights["layer.da.w_qkv_shared"])
        values = (score * (x @ matrix))[-K * H :].reshape(K, H)
        norms.append(np.repeat(np.linalg.norm(values, axis=-1), N // K))
    return np.stack(norms, axis=-1)


def residual(seen, places, depth):
    steps = np.zeros((depth, *np.shape(seen.hidden)[1:]))
    found = {}
    for name, update in seen.updates.items():
        steps += np.asarray(update, np.float64)
        square = np.array([np.mean([np.mean(np.square(update[l, b, t])) for b, t in places]) for l in range(depth)])
        square[square == 0] = np.nan  # a dimension that does not run
        found[f"residual/update/{name}"] = np.sqrt(square)

    def rms(stream):
        return np.sqrt([np.mean([np.mean(np.square(stream[l, b, t])) for b, t in places]) for l in range(depth)])

    found["residual/step"] = rms(steps)
    found["residual/rms"] = rms(np.asarray(seen.hidden, np.float64)[:-1] + steps)
    found["residual/cosine"] = np.array(
        [np.mean([cosine(steps[l, b, t], steps[l + 1, b, t]) for b, t in places]) for l in range(depth - 1)]
    )
    return found


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def readouts(model, seen, tokens, judged, depth):
    config, weights = model.config, {k: np.asarray(v, np.float64) for k, v in named_arrays(model).items()}
    hidden = np.asarray(seen.hidden, np.float64)
    table = {
        name: np.zeros((depth, len(judged))) for name in ("loss", "entropy", "last", "before", "latent", "top", "right")
    }
    for i, (b, t) in enumerate(judged):
        log_ps = []
        for l in range(depth):
            state = hidden[l + 1, b, t]
            if not config.depth_recurrent:
                state = rms_norm(state, weights["final_norm"], config.norm_epsilon)
            logits = state @ weights["lm_head"]
            log_ps.append(logits - np.log(np.sum(np.exp(logits))))
        for l, log_p in enumerate(log_ps):
            p, last = np.exp(log_p), log_ps[-1]
            table["loss"][l, i] = -log_p[tokens[b, t + 1]]
            table["entropy"][l, i] = -np.sum(p * log_p)
            table["last"][l, i] = np.sum(np.exp(last) * (last - log_p))
            table["before"][l, i] = np.sum(p * (log_p - log_ps[l - 1])) if l else np.inf
            table["top"][l, i] = np.argmax(log_p)
            table["right"][l, i] = np.argmax(log_p) == tokens[b, t + 1]
            moved = np.linalg.norm(hidden[l + 1, b, t] - hidden[l, b, t])
            table["latent"][l, i] = moved / np.linalg.norm(hidden[l, b, t])
    loss, top = table["loss"], table["top"]
    settled = np.zeros(depth)
    for i in range(len(judged)):
        first = depth - 1
        while first > 0 and top[first - 1, i] == top[-1, i]:
            first -= 1
        settled[first] += 1 / len(judged)
    gain = loss - loss[-1:]
    change = np.stack([gain > SAME, np.abs(gain) <= SAME, gain < -SAME], axis=1).mean(axis=2)
    found = {
        "lens/loss": loss.mean(axis=1),
        "lens/entropy": table["entropy"].mean(axis=1),
        "lens/divergence": table["last"].mean(axis=1),
        "lens/agreement": (top == top[-1:]).mean(axis=1),
        "lens/accuracy": table["right"].mean(axis=1),
        "lens/change": change,
        "lens/settled": settled,
    }
    for name, values in {"latent": table["latent"], "entropy": table["entropy"], "divergence": table["before"]}.items():
        found |= exits(name, THRESHOLDS[name], lambda l, i, tau, values=values: values[l, i] < tau, loss)
    return found | exits("stable", thresholds("stable", depth), lambda l, i, k: same_for(top, l, i) >= k, loss)


def same_for(top, l, i):
    length = 1
    while l - length >= 0 and top[l - length, i] == top[l, i]:
        length += 1
    return length


def exits(name, taus, met, loss):
    depth, count = loss.shape
    ends, costs = np.zeros(len(taus)), np.zeros(len(taus))
    for k, tau in enumerate(taus):
        for i in range(count):
            at = next((l for l in range(depth - 1) if met(l, i, tau)), depth - 1)
            ends[k] += (at + 1) / count
            costs[k] += loss[at, i] / count
    return {f"exit/{name}/threshold": np.asarray(taus), f"exit/{name}/depth": ends, f"exit/{name}/loss": costs}
