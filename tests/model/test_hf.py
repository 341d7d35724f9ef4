"""Against Hugging Face transformers: logits, gradients, both directions of conversion, and folders that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megastage.checkpoint.hf import export_hf, hf_name, open_hf
from megastage.model.config import ModelConfig, RopeScaling, RopeSpec
from megastage.model.decoder import Decoder
from megastage.model.parameters import parameter_shapes

SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-set": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
    },
}
# (class, config, heads, kv heads, head_dim, tied, theta, scaling)
CASES = [
    (LlamaForCausalLM, LlamaConfig, 4, 4, None, False, 10_000.0, "none"),
    (LlamaForCausalLM, LlamaConfig, 4, 2, None, True, 500_000.0, "llama3"),
    (LlamaForCausalLM, LlamaConfig, 6, 1, 16, False, 10_000.0, "linear"),
    (LlamaForCausalLM, LlamaConfig, 4, 2, 24, False, 10_000.0, "yarn"),
    (Qwen3ForCausalLM, Qwen3Config, 4, 1, 16, True, 1_000_000.0, "none"),
    (Qwen3ForCausalLM, Qwen3Config, 8, 4, 8, False, 50_000.0, "yarn-set"),
    (Qwen3ForCausalLM, Qwen3Config, 6, 3, 32, True, 1_000_000.0, "llama3"),
    (Qwen3ForCausalLM, Qwen3Config, 2, 2, 16, False, 10_000.0, "linear"),
]
IDS = [f"{case[0].__name__[:5]}-{case[2]}x{case[3]}-{case[7]}-{'tied' if case[5] else 'untied'}" for case in CASES]


def hf_model(case) -> torch.nn.Module:
    kind, config, heads, kv_heads, head_dim, tied, theta, scaling = case
    torch.manual_seed(heads * 100 + kv_heads)
    model = kind(
        config(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim or 48 // heads,
            vocab_size=101,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": theta, **(SCALINGS[scaling] or {"rope_type": "default"})},
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            initializer_range=0.15,
            attn_implementation="eager",
            pad_token_id=None,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model.float()


def ours(cfg: ModelConfig, state: dict[str, torch.Tensor], positions: int = 256) -> Decoder:
    with torch.device("meta"):
        model = Decoder(cfg)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.set_rope(cfg.rope, positions)
    return model


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Largest difference below 1e-5 of the largest value."""
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_logits_and_gradients_equal_transformers(case, tmp_path: Path) -> None:
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "hf")
    folder = open_hf(tmp_path / "hf")
    model = ours(folder.cfg, folder.state_dict())
    tokens = torch.randint(101, (2, 150), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(150).expand(2, 150)
    labels = torch.roll(tokens, -1, 1)

    logits = model.logits(model(tokens, positions))
    expected = theirs(tokens).logits
    assert_close(logits, expected)
    for out in (logits, expected):
        torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten()).backward()
    expected_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = expected_grads[hf_name(name)]
        assert (parameter.grad - grad).abs().max() <= 1e-5 * grad.abs().max(), name


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]], ids=[IDS[1], IDS[3], IDS[5]])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_export_loads_in_transformers(case, shard_bytes: int, tmp_path: Path) -> None:
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "hf")
    source = open_hf(tmp_path / "hf")
    state = source.state_dict()
    export_hf(
        tmp_path / "out",
        source.cfg,
        state.__getitem__,
        dtype=torch.float32,
        max_positions=512,
        max_shard_bytes=shard_bytes,
    )
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard_bytes == 40_000)
    assert len(files) == (2 if shard_bytes == 10**9 else len(files))
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is case[0]
    assert loaded.dtype == torch.float32
    tokens = torch.randint(101, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    again = open_hf(tmp_path / "out")
    assert again.cfg == source.cfg
    assert all(torch.equal(again.read(name), state[name]) for name in state)


def test_released_configs_are_read_in_their_own_form() -> None:
    """The keys of Llama-3.2-1B's and Qwen3-8B's released config.json, which predate `rope_parameters`."""
    from megastage.checkpoint.hf_config import parse_hf_config
    from megastage.model.flavors import get_flavor

    llama = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "rope_theta": 500000.0, "hidden_act": "silu",
        "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    }  # fmt: skip
    qwen = {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "rope_theta": 1000000, "rope_scaling": None,
        "max_position_embeddings": 40960, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 36, "hidden_act": "silu", "initializer_range": 0.02,
    }  # fmt: skip
    assert parse_hf_config(llama, "x") == get_flavor("llama3", "1B")
    assert parse_hf_config(qwen, "x") == get_flavor("qwen3", "8B")


CFG = ModelConfig("llama3", 16, 2, 2, 1, 8, 24, 31, rope=RopeSpec(10_000.0, RopeScaling("linear", 2.0)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    state = {name: torch.randn(shape) for name, shape in parameter_shapes(CFG).items()}
    export_hf(folder, CFG, state.__getitem__, max_shard_bytes=2000)
    return folder


def _edit_config(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def _edit_map(key: str, file: str | None):
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"].pop(key, None)
        if file is not None:
            index["weight_map"][key] = file
        path.write_text(json.dumps(index))

    return edit


def _edit_tensor(folder: Path) -> None:
    file = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    save_file(load_file(file) | {"model.norm.weight": torch.ones(17)}, file)


def _truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: not found"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "a JSON object is expected"),
        (_edit_config(model_type="mixtral"), "model_type = 'mixtral' is not supported"),
        (_edit_config(attention_bias=True), "attention_bias = True is not supported"),
        (_edit_config(quantization_config={"quant_method": "fp8"}), "quantized weights"),
        (_edit_config(layer_types=["full_attention", "sliding_attention"]), r"layer_types has \['sliding_attention'\]"),
        (_edit_config(hidden_size="16"), "hidden_size = '16', but a number is needed"),
        (_edit_config(num_attention_heads=0), "num_attention_heads = 0, but a positive integer"),
        (_edit_config(rope_scaling={"rope_type": "longrope"}), "rope_type = 'longrope' is not supported"),
        (_edit_config(rope_scaling={"rope_type": "linear"}), "factor = None, but a number is needed"),
        (_edit_config(vocab_size=32), r"embed_tokens\.weight has shape \[31, 16\], expected \[32, 16\]"),
        (_edit_config(num_hidden_layers=1), r"model\.layers\.1\.\S+ is not part of this model"),
        (_edit_config(num_hidden_layers=3), r"model\.layers\.2\.input_layernorm\.weight is missing"),
        (_edit_map("model.norm.weight", None), r"model\.norm\.weight is missing"),
        (_edit_map("model.norm.weight", "../model.safetensors"), "not a .*safetensors in this folder"),
        (_edit_map("model.norm.weight", "weights.bin"), "not a .*safetensors in this folder"),
        (_edit_map("model.norm.weight", "model-00001-of-00099.safetensors"), "not a readable safetensors file"),
        (_edit_tensor, r"model\.norm\.weight has shape \[17\], expected \[16\]"),
        (_truncate, "not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), r"pickled weights .* are not read"),
    ],
)
def test_wrong_folders_say_what_is_wrong(exported: Path, tmp_path: Path, edit, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    open_hf(folder)
    edit(folder)
    with pytest.raises(ValueError, match=message):
        open_hf(folder)


def test_reads_rows_only(exported: Path) -> None:
    folder = open_hf(exported)
    whole = folder.read("layers.1.feed_forward.w1.weight")
    assert torch.equal(folder.read("layers.1.feed_forward.w1.weight", 5, 9), whole[5:9])
    assert folder.read("layers.1.feed_forward.w1.weight", 5, 5).shape == (0, 16)
    assert folder.read("norm.weight", 3, 16).shape == (13,)
    assert whole.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(exported).dtype == torch.bfloat16


def test_export_never_overwrites(exported: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        export_hf(exported, CFG, lambda name: torch.zeros(1))


def test_export_refuses_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight: shape \[1\], but .* \[31, 16\]"):
        export_hf(tmp_path / "x", CFG, lambda name: torch.zeros(1))
    assert not list(tmp_path.iterdir())
