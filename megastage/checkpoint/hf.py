"""Hugging Face folders (config.json and safetensors) of Llama and Qwen3 models: reading and writing, never pickle.

The layouts agree but for names: matrices are [out, in] and RoPE pairs (i, i + D/2) in both, so nothing is permuted.
Reading is lazy, by rows, so that a rank takes only what it holds; writing plans the shard files from shapes alone and
asks for one tensor at a time, so that a model larger than memory can be converted.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megastage.checkpoint.hf_config import hf_config, parse_hf_config
from megastage.model.config import ModelConfig
from megastage.model.parameters import Shape, parameter_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def hf_name(name: str) -> str:
    """The Hugging Face key of one of our parameter names."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    assert match, name
    return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"


def _ignored(key: str, cfg: ModelConfig) -> bool:
    """Keys that hold nothing of their own: frequencies of old exports, and the second copy of a tied weight."""
    return key.endswith("rotary_emb.inv_freq") or (cfg.tied_embeddings and key == "lm_head.weight")


@dataclass(frozen=True)
class HFFolder:
    """An opened folder. `read` takes our parameter names."""

    folder: Path
    cfg: ModelConfig
    files: dict[str, Path]  # our name -> file

    def read(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows [row_start, row_stop) of a parameter, in the file's dtype, on the CPU."""
        with safe_open(self.files[name], framework="pt", device="cpu") as file:
            return file.get_slice(hf_name(name))[row_start:row_stop]

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters by our names."""
        return {name: self.read(name) for name in self.files}


def open_hf(folder: str | os.PathLike[str]) -> HFFolder:
    """Open a Hugging Face model folder and check that it holds exactly the tensors that its config.json implies.

    Raises ValueError (file, value, way out) for a missing or odd file, an architecture that is not ours, and missing,
    extra or misshapen tensors, all of the latter at once.
    """
    folder = Path(folder)
    cfg = parse_hf_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    location = _locate(folder)
    shapes = parameter_shapes(cfg)
    ours = {hf_name(name): name for name in shapes}
    problems = [f"{key} is missing" for key in ours if key not in location]
    problems += [f"{key} is not part of this model" for key in location if key not in ours and not _ignored(key, cfg)]
    for path in sorted(set(location.values())):
        problems += _file_problems(path, {key for key, at in location.items() if at == path}, ours, shapes)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{folder}: the weights do not fit config.json: {shown}")
    return HFFolder(folder, cfg, {name: location[key] for key, name in ours.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not found; a Hugging Face model folder holds config.json and *.safetensors"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or export it again") from None


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds each Hugging Face key, by the index or else the single file."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ValueError(
                f"{folder}: neither {INDEX} nor {SINGLE}; pickled weights (*.bin, *.pt) are not read: "
                "convert them to safetensors first"
            )
        with _open(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{folder / INDEX}: no "weight_map" of tensor names to files')
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: {key} is said to be in {name!r}, not a *.safetensors in this folder")
    return {key: folder / name for key, name in weight_map.items()}


def _file_problems(path: Path, keys: set[str], ours: dict[str, str], shapes: dict[str, Shape]) -> list[str]:
    problems = []
    with _open(path) as file:
        present = set(file.keys())
        for key in sorted(keys):
            if key not in present:
                problems.append(f"{key} is not in {path.name}, where the index puts it")
            elif key in ours:
                shape = tuple(file.get_slice(key).get_shape())
                if shape != shapes[ours[key]]:
                    problems.append(f"{key} has shape {list(shape)}, expected {list(shapes[ours[key]])}")
    return problems


def unfinished(folder: Path) -> Path:
    """Where an export to `folder` is written until it is complete."""
    return folder.with_name(folder.name + ".tmp")


def export_hf(
    folder: str | os.PathLike[str],
    cfg: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_positions: int = 8192,
    max_shard_bytes: int = 5 * 10**9,
    bos_id: int | None = None,
    eos_id: int | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    read(name) gives the whole parameter by our name (`state_dict.__getitem__` will do). beside: further files by name
    (a tokenizer's). Files are written into `folder.tmp` and renamed at the end. Raises ValueError where either folder
    exists already, or a tensor has not the shape that `cfg` says.
    """
    folder = Path(folder)
    work = unfinished(folder)
    for path in (folder, work):
        if path.exists():
            raise ValueError(f"{path}: exists already; export to a new folder, or remove this one first")
    work.mkdir(parents=True)
    try:
        _write_weights(work, _plan_shards(parameter_shapes(cfg), dtype.itemsize, max_shard_bytes), read, dtype)
        dtype_name = str(dtype).removeprefix("torch.")
        _write_json(work / "config.json", hf_config(cfg, max_positions, dtype_name, bos_id=bos_id, eos_id=eos_id))
        for name, content in (beside or {}).items():
            (work / name).write_bytes(content)
    except BaseException:
        shutil.rmtree(work)
        raise
    work.rename(folder)


def _write_weights(
    work: Path, shards: list[dict[str, Shape]], read: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {hf_name(name): _checked(name, shape, read(name), dtype) for name, shape in shard.items()}
        save_file(tensors, work / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shard in shards for shape in shard.values())
        _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(shapes: dict[str, Shape], itemsize: int, max_bytes: int) -> list[dict[str, Shape]]:
    """Fill files in order; a tensor larger than `max_bytes` has a file of its own."""
    shards: list[dict[str, Shape]] = [{}]
    room = max_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = shape
        room -= size
    return shards


def _checked(name: str, shape: Shape, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, but the model's configuration says {list(shape)}")
    return tensor.detach().to("cpu", dtype).contiguous()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
