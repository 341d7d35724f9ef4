"""What every table of the schema shares: the frozen base class, the `key` helper and the list types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One TOML table: frozen, typed strictly (no "1" for 1, no true for 1), closed to unknown keys.

    `model_fields_set` holds the keys that the user wrote, under their canonical names.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    def is_written(self, name: str) -> bool:
        """Whether the user wrote the key `name` of this table."""
        return name in self.model_fields_set


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A key with its default, its one-line description for `--help` and the editor schema, and its limits."""
    return Field(default, description=doc, **limits)


# TOML gives lists; frozen models hold tuples. Only the outer conversion is lax, the items stay strict.
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Floats = Annotated[tuple[float, ...], Field(strict=False)]
StringLists = Annotated[tuple[Strings, ...], Field(strict=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

DatasetType = Literal["huggingface", "nanoset", "preprocessed", "packed_memmap", "megatron"]
Backend = Literal["auto", "triton", "torch"]
DecayType = Literal["linear", "sqrt", "cosine"]
RecomputeMode = Literal["none", "full", "selective", "memory_budget"]

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1  # of steps, rows, tokens a row: products of two are exact in 64 bits
