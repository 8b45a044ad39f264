"""Initial weights against those of Megatron-LM."""

import json
from pathlib import Path

import pytest
import torch

from lockstep.config.model import ModelConfig
from lockstep.models import build_model, fingerprint
from lockstep.models.philox import CudaNormalGenerator, Grid, philox_words

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["gpt", "llama_like"])
def test_cpu_initialisation_is_megatrons(family, shared: Path, tiny, llama_like):
    golden = json.loads((shared / "facts/formats.json").read_text())["init"]["golden_cpu_init"]["values"][family]
    make = {"gpt": tiny, "llama_like": llama_like}[family]
    model = build_model(make(use_cpu_initialization=True), seed=1234, params_dtype=torch.float32, device=CPU)
    parameters = dict(model.named_parameters())
    for name, (*first, total) in golden.items():
        assert parameters[name].flatten()[:3].tolist() == pytest.approx(first, abs=2e-8), name
        assert parameters[name].sum().item() == pytest.approx(total, abs=2e-5), name


def reference_shape(family: str, tiny, llama_like) -> ModelConfig:
    make = {"gpt_bf16": tiny, "llama_like_bf16": llama_like}[family]
    sizes = {"hidden_size": 256, "ffn_hidden_size": 1024, "kv_channels": 64}
    return make(**sizes, vocab_size=32000, max_position_embeddings=512, seq_length=512)


@pytest.mark.parametrize("family", ["gpt_bf16", "llama_like_bf16"])
def test_gpu_initialisation_is_reproduced_on_the_cpu(family, shared: Path, tiny, llama_like):
    golden = json.loads((shared / "reference/gpu_init.json").read_text())[family]
    config = reference_shape(family, tiny, llama_like)
    model = build_model(config, seed=1234, params_dtype=torch.bfloat16, device=CPU)
    prints = fingerprint(model)
    assert list(golden) == [name for name in prints if name != "all"]
    for name, parameter in model.named_parameters():
        expected = golden[name]
        assert prints[name]["shape"] == expected["shape"]
        assert parameter.flatten()[:3].tolist() == expected["first3"], name
        # One element in thousands rounds to its neighbour, a step of 2**-8 of its value, and a GPU's sine and cosine
        # are off by 2**-23 on average.
        root_mean_square = (expected["sumsq"] / parameter.numel()) ** 0.5
        noise = 2**-8 * (expected["sumsq"] / 1000) ** 0.5 + 2**-23 * root_mean_square * parameter.numel()
        print(f"{name}: sum differs by {prints[name]['sum'] - expected['sum']:.2e}, allowed {noise:.2e}")
        assert prints[name]["sum"] == pytest.approx(expected["sum"], abs=noise), name
        assert prints[name]["sumsq"] == pytest.approx(expected["sumsq"], rel=1e-6), name
        if "position" in name:  # drawn on a CPU there too
            wanted = pytest.approx((expected["sum"], expected["sumsq"]), rel=1e-13)
            assert (prints[name]["sum"], prints[name]["sumsq"]) == wanted


def test_philox_matches_the_published_known_answers():
    # Random123's known-answer vectors for philox4x32, 10 rounds: zero key and counter.
    words = philox_words(0, 0, 0, 1)
    assert [int(word[0]) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_cuda_stream_advances_by_the_numbers_each_thread_consumed():
    grid = Grid(multiprocessors=1, threads_per_multiprocessor=256)
    generator = CudaNormalGenerator(7, grid)
    whole = generator.normal((256 * 8,), 1.0, torch.float32)
    assert generator.offset == 8
    again = CudaNormalGenerator(7, grid)
    parts = [again.normal((256 * 4,), 1.0, torch.float32) for _ in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.mean().abs() < 0.1
    assert whole.std().item() == pytest.approx(1, abs=0.05)


def test_building_leaves_global_random_state_alone(tiny):
    before = torch.get_rng_state()
    build_model(tiny(), seed=1, params_dtype=torch.float32, device=CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_norms_and_biases_are_constant_and_everything_has_the_parameter_dtype(tiny):
    config = tiny(layernorm_zero_centered_gamma=True, qk_layernorm=True)
    model = build_model(config, seed=1, params_dtype=torch.bfloat16, device=CPU)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 1:
            assert not parameter.any(), name
        else:
            assert parameter.float().std() > 0.005, name


def test_projections_into_the_residual_stream_start_smaller(tiny):
    model = build_model(tiny(num_layers=8), seed=1, params_dtype=torch.float32, device=CPU)
    layer = model.get_submodule("decoder.layers.3")
    deviations = {n: p.std().item() for n, p in layer.named_parameters() if p.dim() == 2}
    assert deviations["self_attention.linear_proj.weight"] == pytest.approx(0.02 / 4, rel=0.1)
    assert deviations["mlp.linear_fc2.weight"] == pytest.approx(0.02 / 4, rel=0.1)
    assert deviations["mlp.linear_fc1.weight"] == pytest.approx(0.02, rel=0.1)


def test_fingerprint_changes_with_one_bit(tiny):
    first = build_model(tiny(), seed=1, params_dtype=torch.bfloat16, device=CPU)
    same = build_model(tiny(), seed=1, params_dtype=torch.bfloat16, device=CPU)
    assert fingerprint(first) == fingerprint(same)
    with torch.no_grad():
        same.get_parameter("decoder.final_layernorm.bias")[3] = 1e-3
    changed = [name for name, value in fingerprint(same).items() if value != fingerprint(first)[name]]
    assert changed == ["decoder.final_layernorm.bias", "all"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_draw_the_same_weights(tiny):
    config = tiny(hidden_size=256, vocab_size=32000, kv_channels=64, ffn_hidden_size=1024)
    models = [
        build_model(config, seed=1234, params_dtype=torch.bfloat16, device=torch.device(kind))
        for kind in ("cpu", "cuda")
    ]
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        different = (ours != theirs.cpu()).float().mean().item()
        print(f"{name}: share of elements that differ {different:.2e}")
        assert different < 1e-3
        torch.testing.assert_close(ours, theirs.cpu(), rtol=2**-7, atol=1e-6)
