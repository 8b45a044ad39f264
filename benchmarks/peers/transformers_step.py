"""A plain PyTorch step of Hugging Face's Llama on one GPU: compiled layers, autocast, SDPA, fused AdamW in FP32."""

from typing import Any

import torch

from benchmarks.peers.job import Batches, Job, Turn


def model_of(job: Job, device: torch.device) -> Any:
    """Return the model with random FP32 weights, its layers compiled where the job's are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=job.vocabulary,
        hidden_size=job.hidden,
        intermediate_size=job.ffn,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        num_key_value_heads=job.groups,
        max_position_embeddings=job.length,
        rope_parameters={"rope_type": "default", "rope_theta": job.rotary_base},
        tie_word_embeddings=False,
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config).float()
    if job.compiled:
        for layer in model.model.layers:
            layer.compile()
    return model


def main() -> None:
    """Train and report."""
    import transformers

    turn = Turn.of_command_line()
    job = turn.job
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of(job, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def lost(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    loss_of = torch.compile(lost) if job.compiled else lost

    def take(_: int, batches: Batches, read: bool) -> float:
        total = torch.zeros((), device=device)
        for text, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(model(text.to(device)).logits, labels.to(device)) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item() if read else 0.0

    words = {"attention": str(model.config._attn_implementation)}
    words |= {"compilation": "layer by layer, loss" if job.compiled else "none"}
    turn.report(take, words | {"peer": f"transformers {transformers.__version__}"})


if __name__ == "__main__":
    main()
