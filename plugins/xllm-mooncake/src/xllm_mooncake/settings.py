"""The table `[plugin.mooncake]`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator


class MooncakeTable(BaseModel):
    """Where the master is, what this engine contributes, and how long anything may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    master: str = Field(
        "127.0.0.1:50051",
        description="Host and port of mooncake_master. `xllm mooncake up` starts one for development.",
    )
    host: str = Field("127.0.0.1", description="The address by which other engines reach this machine.")
    allow_wildcard_listeners: bool = Field(
        False,
        description="Consent: Mooncake's client listens on two TCP ports of ALL addresses, without authentication. Nothing starts without it.",
    )
    must_start: bool = Field(
        True, description="Refuse to start when no master answers; false starts without it and keeps looking for it."
    )
    segment_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Memory of this machine that is lent to the store, for every engine's blocks; 0 lends none.",
    )
    staging_bytes: int = Field(
        64 << 20, ge=1 << 16, description="Memory that blocks pass through on their way, half for each direction."
    )
    replicas: int = Field(1, ge=1, description="On how many engines' memory each block is kept.")
    lookup_timeout_s: float = Field(
        0.5,
        gt=0,
        description="A request waits so long to hear whether its blocks are held; then its prompt is computed.",
    )
    load_timeout_s: float = Field(
        2.0, gt=0, description="A request waits so long for blocks that are held; then its prompt is computed."
    )
    save_timeout_s: float = Field(
        2.0,
        gt=0,
        description="Blocks of the device are kept so long for the store; what has not left by then is not saved.",
    )
    secret: SecretStr | None = Field(
        None,
        description="Signs every value; engines take only blocks that were signed with the same one. At most 64 bytes.",
    )

    @field_validator("master")
    @classmethod
    def _has_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{value!r} is not HOST:PORT, e.g. 127.0.0.1:50051")
        return value

    @field_validator("secret")
    @classmethod
    def _fits(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not 1 <= len(value.get_secret_value().encode()) <= 64:
            raise ValueError("a secret has 1 to 64 bytes")
        return value
