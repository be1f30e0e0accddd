"""Strict loading, shared by the model and the pipeline: raises errors where diffusers only warns."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import WEIGHTS_NAME
from typing_extensions import Self

from ..utils.hub_names import holds_lora, hub_or_cache


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
    Put it before `ModelMixin` or `DiffusionPipeline` in a class's bases. Neither a configuration nor a call may have
    unknown keys, as a misspelt one would silently fall back to the default. The weights must be exactly those of the
    configured model, all of them finite.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads like diffusers, but only from safetensors unless `use_safetensors=False` asks for pickled weights.
        Raises OSError if weights are missing, incomplete, corrupt or not those of the configuration; ValueError for
        unknown configuration keys or weights that are not finite; TypeError for unknown arguments.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        is_model = issubclass(cls, torch.nn.Module)
        wants_info = is_model and kwargs.pop("output_loading_info", False)
        default_dtype = torch.get_default_dtype()
        try:
            options = {**kwargs, "output_loading_info": True} if is_model else kwargs
            asked = {"token": kwargs.get("token"), "local_files_only": bool(kwargs.get("local_files_only"))}
            with hub_or_cache(pretrained_model_name_or_path, **asked) as local_files_only:
                options = {**options, "local_files_only": local_files_only}
                loaded = super().from_pretrained(pretrained_model_name_or_path, **options)
        except OSError as error:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if not folder.is_dir() or "Remedy:" in str(error):  # from the Hub, or already complete
                raise
            if not is_model and holds_lora(folder):
                raise OSError(
                    f"{folder} is a LoRA adapter: load its base, and then the adapter with `load_lora_weights`; `pisdm"
                    " generate` takes it as --lora, with its base as --model."
                ) from error
            if not is_model and not (folder / "model_index.json").exists():
                raise OSError(
                    f"{folder} is not a saved pipeline: it has no `model_index.json`. Pass the folder that"
                    " `save_pretrained` or a training run wrote."
                ) from error
            remedy = "Remedy: copy the files again, or download them with `force_download=True`."
            pickles = sorted(folder.rglob(f"{Path(WEIGHTS_NAME).stem}*{Path(WEIGHTS_NAME).suffix}"))
            if pickles and kwargs["use_safetensors"]:
                names = ", ".join(path.relative_to(folder).as_posix() for path in pickles)
                remedy += (
                    f" Pickled weights ({names}) are not read because they can run code; if you trust them, pass"
                    " `use_safetensors=False`."
                )
            raise OSError(f"{str(error).strip()} {remedy}") from error
        except ValueError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # diffusers leaves out the name, and advises to take random weights.
            found = str(error).partition(" because ")[2].partition(". If ")[0]
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit their `config.json`: {found}. Copy or"
                " download both again; they do not belong together."
            ) from error
        except RecursionError as error:
            where = f"A configuration of {cls.__name__} in {pretrained_model_name_or_path}"
            raise ValueError(f"{where} is nested too deeply. Copy or download it again.") from error
        finally:
            torch.set_default_dtype(default_dtype)  # a load that fails in between leaves the model's
        if not is_model:
            for name, component in loaded.components.items():
                if isinstance(component, torch.nn.Module) and not isinstance(component, StrictLoadingMixin):
                    check_finite_weights(f"`{name}` in {pretrained_model_name_or_path}", component)
            return loaded
        model, info = loaded
        where = f"{cls.__name__} in {pretrained_model_name_or_path}"
        # diffusers only warns about these; it leaves what is missing on the meta device.
        missing = [name for name, _ in model.named_parameters() if name in info.get("missing_keys", ())]
        surplus = [] if getattr(model, "hf_quantizer", None) else sorted(info.get("unexpected_keys", ()))
        problems = [
            f"{verb} {', '.join(names)}" for verb, names in (("lack", missing), ("also hold", surplus)) if names
        ]
        if problems:
            raise OSError(
                f"The weights of {where} {' and '.join(problems)}. Remedy: copy or download weights and"
                f" `{cls.config_name}` again; they do not belong together."
            )
        check_finite_weights(where, model)
        return loaded if wants_info else model

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
        # Arguments of `from_pretrained` arrive here after diffusers has taken out its own.
        unknown = [key for key in kwargs if key not in known]
        if unknown:
            options = re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(super().from_pretrained))
            nearest = difflib.get_close_matches(unknown[0], [*known - {"self"}, *options], n=1, cutoff=0.0)[0]
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument {unknown[0]!r}. Did you mean {nearest!r}?"
            )
        return super().extract_init_dict(config_dict, **kwargs)


def check_finite_weights(where: str, model: torch.nn.Module) -> None:
    """Raises a `ValueError` that names the first parameter of a model with NaN or infinite values."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.to(torch.float32).isfinite().all():
            raise ValueError(
                f"`{name}` of {where} holds NaN or infinite weights. Copy or download them again, or take an earlier"
                " checkpoint; if you load in half precision, try `dtype=torch.float32`."
            )
