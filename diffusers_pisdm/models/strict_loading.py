"""Strict loading, shared by the model and the pipeline: raises errors where diffusers only warns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import WEIGHTS_NAME
from typing_extensions import Self


# Keys that diffusers itself adds to a configuration: for quantized models, for remote code, and by `EMAModel`.
KEYS_OF_DIFFUSERS = (
    "quantization_config",
    "auto_map",
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)


class StrictLoadingMixin:
    """
    Put it before `ModelMixin` or `DiffusionPipeline` in a class's bases. A configuration may not contain unknown keys:
    a misspelt one would otherwise silently fall back to the default.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads like diffusers, but only from safetensors unless `use_safetensors=False` asks for pickled weights.
        Raises OSError if weights are missing, incomplete or corrupt, ValueError for unknown configuration keys.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if not folder.is_dir() or "Remedy:" in str(error):  # from the Hub, or already complete
                raise
            remedy = "Remedy: copy the files again, or download them with `force_download=True`."
            pickles = sorted(folder.rglob(f"{Path(WEIGHTS_NAME).stem}*{Path(WEIGHTS_NAME).suffix}"))
            if pickles and kwargs["use_safetensors"]:
                names = ", ".join(path.relative_to(folder).as_posix() for path in pickles)
                remedy += (
                    f" Pickled weights ({names}) are not read because they can run code; if you trust them, pass"
                    " `use_safetensors=False`."
                )
            raise OSError(f"{str(error).strip()} {remedy}") from error
        if isinstance(loaded, torch.nn.Module) and getattr(loaded, "hf_device_map", None) is None:
            # diffusers only warns about parameters missing from the file and leaves them on the meta device.
            missing = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
            if missing:
                raise OSError(
                    f"The weights of {cls.__name__} in {pretrained_model_name_or_path} lack {', '.join(missing)}."
                    f" Remedy: copy or download weights and `{cls.config_name}` again; they do not belong together."
                )
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        known = cls._get_init_keys(cls)
        unknown = sorted(key for key in config_dict if key not in known and not key.startswith("_"))
        unknown = [key for key in unknown if key not in KEYS_OF_DIFFUSERS]
        if unknown:
            raise ValueError(
                f"`{cls.config_name}` of {cls.__name__} contains unknown keys: {', '.join(unknown)}. Correct or remove"
                f" them. Known keys: {', '.join(sorted(known - {'self'}))}."
            )
        return super().extract_init_dict(config_dict, **kwargs)
