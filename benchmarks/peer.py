"""Contestant: a mixture of experts of transformers with LA's shape. Started by train_step.py and decode.py.

The same rows, AdamW and gradient clipping; attention through PyTorch's scaled_dot_product_attention. Balanced as each
model is meant to be: Qwen3 by its auxiliary loss, GLM-4 by a bias on its router, which this file moves towards an even
load, as DeepSeek-V3 does.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from contestant import HostMemory, serve
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
    (decode if spec.get("batch") else train)(model, config, spec, memory)


@torch.inference_mode()
def decode(model: Any, config: Config, spec: dict[str, Any], memory: HostMemory) -> None:
    """Read prompts, then decode a token of each row at every step, greedily; weights as initialised."""
    rows = np.load(spec["rows"])
    prompts = np.resize(rows.reshape(-1, rows.shape[-1])[:, : spec["prompt"]], (spec["batch"], spec["prompt"])).astype(
        np.int64
    )
    model.eval()
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
