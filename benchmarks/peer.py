"""Contestant: a mixture of experts of transformers with LA's shape. Started by train_step.py and decode.py.

The same rows, AdamW and gradient clipping; attention through PyTorch's scaled_dot_product_attention. Balanced as each
model is meant to be: Qwen3 by its auxiliary loss, GLM-4 by a bias on its router, which this file moves towards an even
load, as DeepSeek-V3 does.
"""

import contextlib
import copy
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from contestant import HostMemory, serve
from decode import Request, Way, in_batches, serve_ways
from sizes import configs

from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.config import Config, ModelConfig

CLIP = 0.5


def main() -> None:
    spec = json.loads(sys.argv[-1])
    config = configs(spec["size"])["LA"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    memory = HostMemory()
    dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    model = made(spec["name"], config, spec["experts"], dtype).to(device)
    (answer if "queue" in spec else decode if spec.get("batch") else train)(model, config, spec, memory)


@torch.inference_mode()
def answer(model: Any, config: Config, spec: dict[str, Any], memory: HostMemory) -> None:
    """Answer the whole queue, in one way after the other; weights as initialised."""
    requests: list[Request] = json.loads(Path(spec["queue"]).read_text())
    prepare(model)
    ways: dict[str, Way] = {}
    with contextlib.ExitStack() as stack:
        for slots in spec["slots"]:
            if not spec["refilled"]:
                ways[f"{slots} in batches"] = functools.partial(batched, model, slots)
                continue
            # A model for each: the manager changes how it attends.
            own = copy.deepcopy(model)
            manager = stack.enter_context(managed(own, requests, slots))
            ways[f"{slots} refilled"] = functools.partial(refilled, own, manager, slots)
        serve_ways(ways, requests)


def prepare(model: Any) -> Any:
    """The model, which counts how often it is called and computes no loss."""
    model.eval()
    model.config.output_router_logits = False
    model.calls = 0
    model.register_forward_pre_hook(counted)
    return model


def counted(model: Any, _: Any) -> None:
    """Before each call of a model."""
    model.calls += 1


def batched(model: Any, slots: int, requests: list[Request]) -> float:
    """Answer batch by batch, each padded to its longest prompt and answer; the share of slot-steps that were wanted."""
    model.calls = 0
    batches = in_batches(requests, slots)
    for batch in batches:
        longest = max(len(tokens) for tokens, _ in batch)
        padding = [longest - len(tokens) for tokens, _ in batch]
        prompts = [[0] * pad + tokens for pad, (tokens, _) in zip(padding, batch, strict=True)]
        seen = [[0] * pad + [1] * (longest - pad) for pad in padding]
        most = max(most for _, most in batch)
        answers = model.generate(
            input_ids=torch.tensor(prompts, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            generation_config=greedy(most),
        )
        assert answers.shape[1] == longest + most
    return sum(most - 1 for _, most in requests) / (slots * (model.calls - len(batches)))


def managed(model: Any, requests: list[Request], slots: int) -> Any:
    """The library's continuous batching, started; pages for as many of the longest requests as there are slots."""
    page = 256
    longest = max(len(tokens) + most for tokens, most in requests)
    settings = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=slots * -(-longest // page),
        max_batch_tokens=512,
        max_requests_per_batch=slots,
        allow_block_sharing=False,
    )
    return model.continuous_batching_context_manager(
        generation_config=greedy(longest), continuous_batching_config=settings, timeout=5
    )


def refilled(model: Any, manager: Any, slots: int, requests: list[Request]) -> float:
    """Answer all with continuous batching, which reads prompts in the steps that make tokens."""
    made: dict[str, int] = {}
    model.calls = 0
    wanted = {manager.add_request(tokens, max_new_tokens=most): most for tokens, most in requests}
    while len(made) < len(wanted):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching stopped")
        if result is not None and result.is_finished():
            made[result.request_id] = len(result.generated_tokens)
    assert made == wanted
    return sum(wanted.values()) / (slots * model.calls)


def greedy(most: int) -> transformers.GenerationConfig:
    """The likeliest token, exactly `most` times."""
    return transformers.GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0)


@torch.inference_mode()
def decode(model: Any, config: Config, spec: dict[str, Any], memory: HostMemory) -> None:
    """Read prompts, then decode a token of each row at every step, greedily; weights as initialised."""
    rows = np.load(spec["rows"])
    prompts = np.resize(rows.reshape(-1, rows.shape[-1])[:, : spec["prompt"]], (spec["batch"], spec["prompt"])).astype(
        np.int64
    )
    prepare(model)
    output = model(input_ids=torch.from_numpy(prompts).to(model.device), use_cache=True, logits_to_keep=1)

    def take() -> None:
        nonlocal output
        tokens = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    take()
    serve({"tokens": len(prompts)}, take, memory.peak)


def train(model: Any, config: Config, spec: dict[str, Any], memory: HostMemory) -> None:
    """Warm up on all rows, then take steps on the last."""
    device, dtype = model.device.type, model.dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate, fused=True)
    batches = [torch.from_numpy(part.astype(np.int64)).to(device) for part in np.load(spec["rows"])]
    counts = Counts(model)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    function = torch.compile(loss_of) if spec["compiled"] else loss_of

    def step(tokens: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = function(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    started = time.perf_counter()
    step(batches[0])
    compile_seconds = time.perf_counter() - started
    for tokens in batches:
        loss = step(tokens)
        counts.balance(config.optimizer.expert_bias_rate)
    about = {
        "compile_seconds": compile_seconds if spec["compiled"] else 0.0,
        "tokens": batches[0].numel(),
        "flops": training_flops(config.model, config.data.context).total,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "imbalance": counts.imbalance(),
        "matmul_flops": matmul_flops(dtype, device),
    }
    counts.remove()
    memory.reset()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else memory.peak()

    def take() -> None:
        step(batches[-1])
        if device == "cuda":
            torch.cuda.synchronize()

    serve(about, take, peak_bytes)


def made(name: str, config: Config, experts: str, dtype: torch.dtype) -> torch.nn.Module:
    """A random model with LA's shape: the same matrix products per token, but for LA's low-rank router."""
    m: ModelConfig = config.model
    shape: dict[str, Any] = dict(
        vocab_size=m.vocab,
        hidden_size=m.width,
        num_hidden_layers=m.depth,
        num_attention_heads=m.sa.query_heads,
        num_key_value_heads=m.sa.kv_heads,
        head_dim=m.sa.head_size,
        moe_intermediate_size=m.ea.expert_width,
        intermediate_size=m.ea.expert_width,
        num_experts_per_tok=m.ea.active_experts,
        norm_topk_prob=True,
        max_position_embeddings=config.data.context,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    if name == "Qwen3Moe":
        made = transformers.Qwen3MoeConfig(
            **shape, num_experts=m.ea.experts, decoder_sparse_step=1, output_router_logits=True
        )
    else:
        made = transformers.Glm4MoeConfig(
            **shape, n_routed_experts=m.ea.experts, n_shared_experts=0, first_k_dense_replace=0, n_group=1,
            topk_group=1, use_qk_norm=True, partial_rotary_factor=1.0,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)


class Counts:
    """Tokens of each expert, read from what the routers return; GLM-4's bias."""

    def __init__(self, model: torch.nn.Module):
        """Listens to every module with a router's name."""
        self.last: dict[torch.nn.Module, torch.Tensor] = {}
        routers = [m for m in model.modules() if type(m).__name__.endswith(("TopkRouter", "TopKRouter"))]
        self._hooks = [router.register_forward_hook(self._note) for router in routers]

    def _note(self, router: torch.nn.Module, inputs: Any, output: Any) -> None:
        logits, _, chosen = output
        self.last[router] = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])

    def balance(self, rate: float) -> None:
        """Move GLM-4's biases towards an even load."""
        for router, counts in self.last.items():
            bias = getattr(router, "e_score_correction_bias", None)
            if bias is not None:
                bias += rate * torch.sign(counts.float().mean() - counts)

    def imbalance(self) -> float:
        """Tokens of the busiest expert over the mean, averaged over layers."""
        return float(np.mean([float(c.max() / c.float().mean()) for c in self.last.values()]))

    def remove(self) -> None:
        """Listen no more: timed steps are the library's alone."""
        for hook in self._hooks:
            hook.remove()


def matmul_flops(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of one large matrix product, the best of five."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    best = np.inf
    for _ in range(6):
        started = time.perf_counter()
        product = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    del product
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
