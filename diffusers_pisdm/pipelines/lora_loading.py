"""LoRA adapters for a cascade (CN): one file for all stages, with the classes that the adapter was trained for."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND, _get_model_file
from safetensors import SafetensorError, safe_open

from ..models.transformer_pisdm import PISDMTransformer2DModel, get_class_embedding, set_class_embedding


CLASS_EMBEDDING = "class_embedding.weight"
_REMEDY = "Load it into the cascade that it was trained for, with all stages."


@dataclass
class FormerClasses:
    """The pipeline's classes before an adapter replaced them with its own."""

    adapter_name: str
    embeddings: dict[str, torch.Tensor]
    class_factors: dict[str, Any]
    id2label: dict[int, str] | None


class PISDMLoraLoaderMixin(LoraBaseMixin):
    r"""
    Loads, saves, combines and fuses LoRA adapters for a cascade. Adapters are trained with
    [`~training.fine_tuning.add_lora`]; all methods need PEFT.

    An adapter may bring its own classes: then its file holds each stage's class embedding and the class names, and
    loading it replaces the pipeline's. `unload_lora_weights` and `delete_adapters` on the same pipeline object restore
    the former classes; scaling, disabling or deactivating the adapter does not.
    """

    _former_classes: FormerClasses | None = None

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        return_lora_metadata: bool = False,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        r"""
        Reads an adapter's weights, from safetensors only.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A repository on the Hub, a folder, a file, or the weights themselves, which are returned unchanged.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`):
                The file's name in the repository or folder.
            subfolder (`str`, *optional*): The file's subfolder in the repository or folder.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): The Hub token; `True` uses the stored one.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are cached.
            force_download (`bool`, defaults to `False`): Whether to download even if the file is cached.
            local_files_only (`bool`, defaults to `False`): Whether to use only local files, without downloading.
            return_lora_metadata (`bool`, defaults to `False`): Whether to also return the adapter's configuration.

        Returns:
            `dict[str, torch.Tensor]`: Weights keyed by `<stage>.<layer>.lora_A.weight` and so on; with
            `return_lora_metadata`, a tuple of the weights and the configuration (`None` if there is none).

        Raises:
            OSError: The file is missing or damaged.
            ValueError: The file is not a safetensors file.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            state_dict, metadata = pretrained_model_name_or_path_or_dict, None
        else:
            source = os.fspath(pretrained_model_name_or_path_or_dict)
            if os.path.isdir(source) and subfolder is not None:
                source, subfolder = os.path.join(source, subfolder), None  # diffusers would look outside it first
            _check_is_safetensors(source if os.path.isfile(source) else weight_name)
            try:
                file = _get_model_file(
                    source,
                    weights_name=weight_name,
                    subfolder=subfolder,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            except OSError as error:
                raise OSError(
                    f"{error} Pass the file, folder or repository of an adapter, with `weight_name` and `subfolder` if"
                    " its file has another name or location. Pickled weights are not read, as they can run code."
                ) from error
            try:
                with safe_open(file, framework="pt") as opened:
                    state_dict = {key: opened.get_tensor(key) for key in opened.keys()}
                    metadata = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
            except SafetensorError as error:
                raise OSError(
                    f"Unable to load LoRA weights from {file}: {error}. The file is truncated or corrupt; copy it"
                    " again, or download it with `force_download=True`."
                ) from error
            metadata = json.loads(metadata) if metadata is not None else None
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> None:
        r"""
        Loads an adapter into the stages it was trained for and activates it alone; `set_adapters` combines several. An
        adapter that does not fit raises an error before anything is changed.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A repository on the Hub, a folder or file written by [`~save_lora_weights`], or weights by key. Weights
                have no adapter configuration: alpha then equals the rank, and the classes have no names.
            adapter_name (`str`, *optional*): The adapter's name; by default `"default_0"` and so on.
            hotswap (`bool`, defaults to `False`):
                Whether to replace the weights of the adapter with this name in place, without recompiling.
            weight_name, subfolder, revision, token, cache_dir, force_download, local_files_only:
                See `lora_state_dict`.

        Raises:
            ImportError: PEFT is not installed.
            OSError: The file is missing or damaged.
            ValueError: The file is not a safetensors file, the adapter does not fit the pipeline, or its name is
                taken.
        """
        _require_peft()
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            return_lora_metadata=True,
        )
        weights, metadata = _split_by_component(state_dict), _split_by_component(metadata or {})
        adapter_name = adapter_name or self._make_adapter_name()
        transformers = self._get_lora_transformers()

        # Check everything before changing anything.
        _check_adapter_fits(weights, transformers)
        embeddings = {
            name: layers.pop(CLASS_EMBEDDING) for name, layers in weights.items() if CLASS_EMBEDDING in layers
        }
        weights = {name: layers for name, layers in weights.items() if layers}
        self._check_adapter_name(adapter_name, list(weights), hotswap)
        replaced = self._former_classes.adapter_name if self._former_classes is not None else None
        if embeddings and replaced is not None and not (hotswap and replaced == adapter_name):
            raise ValueError(
                f"The adapter brings its own classes, but `{replaced}` already did. Call"
                f" `delete_adapters({replaced!r})` first."
            )

        if hotswap:
            self._restore_classes([adapter_name])
        if embeddings:
            former = {name: transformer.class_embedding.weight for name, transformer in transformers.items()}
            factors = {name: transformer.config.class_factors for name, transformer in transformers.items()}
            former_classes = FormerClasses(adapter_name, former, factors, self.config.id2label)
            id2label = metadata.get("pipeline", {}).get("id2label")
            if id2label is not None:
                id2label = {int(i): name for i, name in id2label.items()}  # JSON turned the ids into strings
            self._set_classes(embeddings, dict.fromkeys(embeddings), id2label)
            self._former_classes = former_classes
        try:
            for name, layers in weights.items():
                transformers[name].load_lora_adapter(
                    layers,
                    prefix=None,
                    adapter_name=adapter_name,
                    metadata=metadata.get(name),
                    hotswap=hotswap,
                    _pipeline=self,
                )
        except Exception:
            self.delete_adapters(adapter_name)  # from the stages already loaded
            raise
        if not hotswap:
            # PEFT activates it only in its own stages; the others would keep the previous adapter active.
            self.set_adapters(adapter_name)

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        save_class_embeddings: bool = False,
    ) -> None:
        r"""
        Saves an adapter from all of its stages into one file, for [`~load_lora_weights`]. Unlike in diffusers'
        pipelines, this is not a class method: the pipeline has everything that goes into the file.

        Args:
            save_directory (`str` or `os.PathLike`): A folder, created if it does not exist.
            adapter_name (`str`, *optional*): The adapter's name; required if there are several.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`): The file's name.
            save_class_embeddings (`bool`, defaults to `False`):
                Whether to also save all stages' class embeddings and the class names. Required if the adapter was
                trained for other classes than those of the pipeline it will be loaded into.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: There is no such adapter, the path is not a folder, or the name does not end in `.safetensors`.
        """
        _require_peft()
        from peft import get_peft_model_state_dict

        _check_is_safetensors(weight_name)
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` is a file: {save_directory}. Pass a folder.")
        adapter_name = self._get_saved_adapter_name(adapter_name)
        state_dict, metadata = {}, {}
        for name, transformer in self._get_lora_transformers().items():
            if adapter_name in getattr(transformer, "peft_config", {}):
                layers = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
                state_dict.update(self.pack_weights(layers, name))
                metadata.update(self.pack_weights(transformer.peft_config[adapter_name].to_dict(), name))
            if save_class_embeddings:
                weight = get_class_embedding(transformer).detach()
                state_dict.update(self.pack_weights({CLASS_EMBEDDING: weight}, name))
        if save_class_embeddings:
            metadata.update(self.pack_weights({"id2label": self.config.id2label}, "pipeline"))
        self.write_lora_layers(
            state_dict,
            save_directory,
            is_main_process=True,
            weight_name=weight_name,
            save_function=None,
            safe_serialization=True,
            lora_adapter_metadata=metadata,
        )

    def unload_lora_weights(self) -> None:
        r"""
        Removes all adapters and restores the classes that one of them replaced. A fused adapter stays fused into the
        weights and keeps its classes: `fuse_lora`, `unload_lora_weights` and `save_pretrained` turn an adapter into a
        standalone pipeline.
        """
        self._restore_classes(self._get_adapter_names())
        super().unload_lora_weights()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        r"""
        Removes adapters and restores the classes that one of them replaced, unless it is fused.

        Args:
            adapter_names (`list[str]` or `str`): The adapters' names.
        """
        self._restore_classes([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().delete_adapters(adapter_names)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        r"""
        Merges adapters into the weights they adapt, so that they cost nothing at inference.

        Args:
            components (`list[str]`, *optional*): The stages' names, e.g. `"transformer_2"`; all by default.
            lora_scale (`float`, defaults to 1.0):
                Factor on the adapters' weights; it lasts beyond `unfuse_lora`, until `set_adapters` is called.
            safe_fusing (`bool`, defaults to `False`): Whether to raise an error if fused weights are not finite.
            adapter_names (`list[str]`, *optional*): The adapters to fuse; the active ones by default.
        """
        super().fuse_lora(
            components=self._lora_loadable_modules if components is None else components,
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
        )

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        r"""
        Undoes `fuse_lora`.

        Args:
            components (`list[str]`, *optional*): The stages' names; all by default.
        """
        super().unfuse_lora(self._lora_loadable_modules if components is None else components)

    def _get_lora_transformers(self) -> dict[str, PISDMTransformer2DModel]:
        transformers = {name: getattr(self, name) for name in self._lora_loadable_modules}
        return {name: transformer for name, transformer in transformers.items() if transformer is not None}

    def _get_adapter_names(self) -> list[str]:
        return sorted({name for names in self.get_list_adapters().values() for name in names})

    def _make_adapter_name(self) -> str:
        # One name for all stages: diffusers would number the adapters separately in each.
        names = (f"default_{i}" for i in itertools.count())
        return next(name for name in names if name not in self._get_adapter_names())

    def _get_saved_adapter_name(self, adapter_name: str | None) -> str:
        names = self._get_adapter_names()
        if adapter_name is None and len(names) == 1:
            return names[0]
        if adapter_name not in names:
            problem = "is not an adapter of this pipeline" if adapter_name else "does not say which adapter to save"
            remedy = f"Pass one of {', '.join(map(repr, names))}." if names else "Add or load one first."
            raise ValueError(f"`adapter_name={adapter_name!r}` {problem}. {remedy}")
        return adapter_name

    def _check_adapter_name(self, adapter_name: str, stages: list[str], hotswap: bool) -> None:
        present = [stage for stage, names in self.get_list_adapters().items() if adapter_name in names]
        if hotswap and sorted(present) != sorted(stages):
            raise ValueError(
                f"`hotswap=True` needs an adapter `{adapter_name}` on the new one's stages, {_quote(stages)}, but it"
                f" is on {_quote(present) or 'none'}. Load the new one under another name, without `hotswap`."
            )
        if present and not hotswap:
            raise ValueError(
                f"The pipeline already has an adapter `{adapter_name}`. Pass another `adapter_name`, or call"
                f" `delete_adapters({adapter_name!r})` first."
            )

    def _set_classes(
        self, embeddings: dict[str, torch.Tensor], class_factors: dict[str, Any], id2label: dict[int, str] | None
    ) -> None:
        for name, transformer in self._get_lora_transformers().items():
            set_class_embedding(transformer, embeddings[name], class_factors[name])
        self.register_to_config(id2label=id2label)

    def _restore_classes(self, removed_adapters: list[str]) -> None:
        former = self._former_classes
        if former is None or former.adapter_name not in removed_adapters:
            return
        modules = itertools.chain(*(transformer.modules() for transformer in self._get_lora_transformers().values()))
        if not any(former.adapter_name in getattr(module, "merged_adapters", ()) for module in modules):
            self._set_classes(former.embeddings, former.class_factors, former.id2label)
        self._former_classes = None


def _require_peft() -> None:
    if not USE_PEFT_BACKEND:
        raise ImportError(
            "LoRA adapters need PEFT, which is missing or too old. Run `pip install -U peft transformers`."
        )


def _check_is_safetensors(name: str) -> None:
    if Path(name).suffix != ".safetensors":
        raise ValueError(
            f"`{name}` is not a safetensors file. LoRA weights are only read and written as safetensors, as pickles"
            " can run code: pass a name that ends in `.safetensors`."
        )


def _split_by_component(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # `transformer_2.transformer_blocks.0...` belongs to `transformer_2`
    components: dict[str, dict[str, Any]] = {}
    for key in sorted(values):
        component, _, rest = key.partition(".")
        components.setdefault(component, {})[rest] = values[key]
    return components


def _check_adapter_fits(
    weights: dict[str, dict[str, torch.Tensor]], transformers: dict[str, PISDMTransformer2DModel]
) -> None:
    # PEFT would only notice with the adapter half loaded, or merely warn.
    absent = [name for name in weights if name not in transformers]
    if absent:
        raise ValueError(
            f"The adapter has weights for {_quote(absent)}, but this pipeline's stages are {_quote(transformers)}."
            f" {_REMEDY}"
        )
    if not any(".lora_" in key for layers in weights.values() for key in layers):
        raise ValueError("The adapter has no LoRA weights. Pass one written by `save_lora_weights`.")
    for name, layers in weights.items():
        for key, weight in layers.items():
            if key == CLASS_EMBEDDING:
                _check_embedding(name, transformers[name], weight)
            else:
                _check_layer(name, transformers[name], key, weight)
    with_classes = [name for name, layers in weights.items() if CLASS_EMBEDDING in layers]
    without = [name for name in transformers if name not in with_classes]
    if with_classes and without:
        raise ValueError(
            f"The adapter brings its own classes, but not for {_quote(without)}, and all stages need the same classes."
            f" Load the pipeline without this stage (`{without[0]}=None`), or an adapter that was saved with it."
        )


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _check_embedding(name: str, transformer: PISDMTransformer2DModel, weight: torch.Tensor) -> None:
    width = transformer.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"The adapter's `{name}.{CLASS_EMBEDDING}` has shape {tuple(weight.shape)}, but `{name}` needs rows of"
            f" {width} (`hidden_size`). {_REMEDY}"
        )


def _check_layer(name: str, transformer: PISDMTransformer2DModel, key: str, weight: torch.Tensor) -> None:
    path, lora, matrix = key.partition(".lora_")
    if not lora:
        raise ValueError(
            f"`{name}.{key}` is not a LoRA weight. Keys have to look like `{name}.<layer>.lora_A.weight`: convert"
            " other formats first."
        )
    try:
        layer = transformer.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"The adapter adapts `{path}` of `{name}`, which has no such layer. {_REMEDY}") from error
    dim, size = {"A.weight": (1, "in_features"), "B.weight": (0, "out_features")}.get(matrix, (None, ""))
    expected = getattr(layer, size, None)  # PEFT checks layers other than linear ones
    if expected is not None and weight.shape[dim] != expected:
        raise ValueError(
            f"The adapter's `{name}.{key}` has shape {tuple(weight.shape)}, but `{path}` has"
            f" {size}={expected}. {_REMEDY}"
        )
