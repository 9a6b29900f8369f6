"""Contestant: llama.cpp with LA's shape, through its server in the xllamacpp package. Started by decode.py.

The architecture is Qwen3's mixture of experts, with random weights in a GGUF file. Keys and values are kept in float16,
which is llama.cpp's own choice, faster than float32 even where the weights are float32.
"""

import functools
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from decode import Request, Way, serve_ways, threads
from sizes import configs

from dreamer_jax.config import ModelConfig


def main() -> None:
    spec = json.loads(sys.argv[-1])
    requests: list[Request] = json.loads(Path(spec["queue"]).read_text())
    longest = max(len(tokens) + most for tokens, most in requests)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write_model(path, configs(spec["size"])["LA"].model, longest, np.dtype(spec["dtype"]))
        servers = {slots: server(path, slots, longest) for slots in spec["slots"]}
    ways: dict[str, Way] = {
        f"{slots} refilled": functools.partial(answered, servers[slots], slots) for slots in servers
    }
    serve_ways(ways, requests)


def server(path: Path, slots: int, longest: int) -> Any:
    """A server that works on as many requests at a time as it has slots, and remembers none of them."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = slots, slots * -(-longest // 256) * 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    params.n_threads_http = slots + 2
    params.cache_prompt = params.cache_idle_slots = params.fit_params = False
    params.cache_ram_mib = params.n_gpu_layers = 0
    params.endpoint_metrics, params.verbosity = True, 1
    return xllamacpp.Server(params)


def answered(server: Any, slots: int, requests: list[Request]) -> float:
    """Answer all; the share of slot-steps that made a token. Prompts are read in the steps that make tokens."""
    before = steps(server)
    with ThreadPoolExecutor(len(requests)) as pool:
        made = list(pool.map(functools.partial(completed, server), requests))
    wanted = [most for _, most in requests]
    assert made == wanted
    return sum(wanted) / (slots * (steps(server) - before))


def completed(server: Any, request: Request) -> int:
    """Tokens that the server said to one request."""
    tokens, most = request
    asked = {"prompt": tokens, "max_tokens": most, "ignore_eos": True, "temperature": 0.0, "samplers": ["temperature"]}
    return int(server.handle_completions(asked | {"cache_prompt": False})["usage"]["completion_tokens"])


def steps(server: Any) -> int:
    """Forward passes so far."""
    found = re.search(r"^llamacpp:n_decode_total (\d+)", server.handle_metrics(), re.MULTILINE)
    assert found
    return int(found[1])


def write_model(path: Path, m: ModelConfig, context: int, dtype: np.dtype) -> None:
    """Random matrices; what llama.cpp always keeps in float32, norms and routers, is so."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    write_shape(writer, m, context)
    write_words(writer, m.vocab)

    def matrix(name: str, *shape: int, kept: bool = False) -> None:
        values = 0.02 * random.standard_normal(shape, np.float32)
        writer.add_tensor(f"{name}.weight", values if kept else values.astype(dtype))

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    queries, keys = m.sa.query_heads * m.sa.head_size, m.sa.kv_heads * m.sa.head_size
    matrix("token_embd", m.vocab, m.width)
    norm("output_norm", m.width)
    matrix("output", m.vocab, m.width)
    for layer in range(m.depth):
        block = f"blk.{layer}"
        for name, size in ("attn", m.width), ("ffn", m.width), ("attn_q", m.sa.head_size), ("attn_k", m.sa.head_size):
            norm(f"{block}.{name}_norm", size)
        matrix(f"{block}.attn_q", queries, m.width)
        matrix(f"{block}.attn_k", keys, m.width)
        matrix(f"{block}.attn_v", keys, m.width)
        matrix(f"{block}.attn_output", m.width, queries)
        matrix(f"{block}.ffn_gate_inp", m.ea.experts, m.width, kept=True)
        matrix(f"{block}.ffn_gate_exps", m.ea.experts, m.ea.expert_width, m.width)
        matrix(f"{block}.ffn_up_exps", m.ea.experts, m.ea.expert_width, m.width)
        matrix(f"{block}.ffn_down_exps", m.ea.experts, m.width, m.ea.expert_width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shape(writer: gguf.GGUFWriter, m: ModelConfig, context: int) -> None:
    writer.add_block_count(m.depth)
    writer.add_context_length(-(-context // 256) * 256)
    writer.add_embedding_length(m.width)
    writer.add_feed_forward_length(m.ea.expert_width)
    writer.add_head_count(m.sa.query_heads)
    writer.add_head_count_kv(m.sa.kv_heads)
    writer.add_key_length(m.sa.head_size)
    writer.add_value_length(m.sa.head_size)
    writer.add_rope_freq_base(m.sa.rope_base)
    writer.add_layer_norm_rms_eps(m.norm_epsilon)
    writer.add_expert_count(m.ea.experts)
    writer.add_expert_used_count(m.ea.active_experts)
    writer.add_expert_feed_forward_length(m.ea.expert_width)


def write_words(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A made-up vocabulary: three special tokens, the bytes, and words that nobody reads."""
    kinds = gguf.TokenType
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    rest = vocab - len(words)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words + [f"w{number}" for number in range(rest)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types(types + [kinds.NORMAL] * rest)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    main()
