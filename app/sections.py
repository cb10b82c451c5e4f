"""What every section of the configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Strict: a key that nobody reads, or a value of another type, stops the start."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", str_max_length=4096)
