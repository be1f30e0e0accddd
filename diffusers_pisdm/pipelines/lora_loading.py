"""LoRA adapters for a cascade (CN): one file for all stages, with the classes that the adapter was trained for."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND, _get_model_file, logging
from safetensors import SafetensorError, safe_open

from ..models.transformer_pisdm import PISDMTransformer2DModel, get_class_embedding, set_class_embedding
from ..utils.files import write_whole
from ..utils.hub_names import hub_or_cache
from .lora_fit import (
    CLASS_EMBEDDING,
    PIPELINE,
    check_adapter_fits,
    config_fault,
    plain_config,
    quote,
    read_classes,
    read_config,
    split_by_component,
)
from .saved_files import RIGHTS_KEY


logger = logging.get_logger(__name__)


@dataclass
class FormerClasses:
    """The pipeline's classes before an adapter replaced them with its own."""

    adapter_name: str
    embeddings: dict[str, torch.Tensor]
    class_factors: dict[str, Any]
    id2label: dict[int, str] | None


class class_or_instance_method:
    """A method whose first argument is the instance that it is called on or, called on a class, the class."""

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)

    def __get__(self, instance: Any, owner: type) -> Callable:
        return MethodType(self.__wrapped__, owner if instance is None else instance)


class PISDMLoraLoaderMixin(LoraBaseMixin):
    r"""
    Loads, saves, combines and fuses LoRA adapters for a cascade. Adapters are trained with
    [`~training.fine_tuning.add_lora`]; all methods need PEFT.

    An adapter may bring its own classes: then its file holds each stage's class embedding and the class names, and
    loading it replaces the pipeline's. `unload_lora_weights` and `delete_adapters` on the same pipeline object restore
    the former classes; scaling, disabling or deactivating the adapter does not.
    """

    transformer_name = "transformer"  # as in diffusers' mixins
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
        use_safetensors: bool | None = None,
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
            use_safetensors (`bool`, *optional*): As in diffusers; `False` is refused, as pickles can run code.
            return_lora_metadata (`bool`, defaults to `False`): Whether to also return the adapter's configuration.

        Returns:
            `dict[str, torch.Tensor]`: Weights keyed by `<stage>.<layer>.lora_A.weight` and so on; with
            `return_lora_metadata`, a tuple of the weights and the configuration (`None` if there is none).

        Raises:
            OSError: The file is missing or damaged.
            ValueError: The file is not a safetensors file.
        """
        if use_safetensors is not None:
            _check_is_safetensors("use_safetensors", use_safetensors)
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            state_dict, metadata = pretrained_model_name_or_path_or_dict, None
        else:
            source = os.fspath(pretrained_model_name_or_path_or_dict)
            if os.path.isdir(source) and subfolder is not None:
                source, subfolder = os.path.join(source, subfolder), None  # diffusers would look outside it first
            _check_name(source if os.path.isfile(source) else weight_name)
            is_here = os.path.isfile(source) or local_files_only
            try:
                with hub_or_cache(source, token=token, local_files_only=is_here) as local_files_only:
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
                    metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null"))
                    if not isinstance(metadata, (dict, type(None))):
                        raise ValueError(f"`{LORA_ADAPTER_METADATA_KEY}` is not a dictionary")
            except (SafetensorError, ValueError, RecursionError) as error:
                raise OSError(
                    f"Unable to load LoRA weights from {file}: {error}. The file is truncated or corrupt; copy it"
                    " again, or download it with `force_download=True`."
                ) from error
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
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        r"""
        Loads an adapter into the stages it was trained for and activates it alone; `set_adapters` combines several. An
        adapter that cannot be loaded raises an error and leaves the pipeline as it was. Of the file's configuration,
        only what plain LoRA and DoRA adapters need is read.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A repository on the Hub, a folder or file written by [`~save_lora_weights`], or weights by key. Weights
                have no adapter configuration: alpha then equals the rank, and the classes have no names.
            adapter_name (`str`, *optional*): The adapter's name; by default `"default_0"` and so on.
            hotswap (`bool`, defaults to `False`):
                Whether to replace the weights of the adapter with this name in place, without recompiling.
            weight_name, subfolder, revision, token, cache_dir, force_download, local_files_only, use_safetensors:
                See `lora_state_dict`.
            low_cpu_mem_usage (`bool`, defaults to `False`):
                Whether to make the adapter's layers without random weights first, which is faster.

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
            use_safetensors=use_safetensors,
            return_lora_metadata=True,
        )
        weights, metadata = split_by_component(state_dict), split_by_component(metadata or {})
        foreign = [name for name in weights if name not in self._lora_loadable_modules]
        weights = {name: layers for name, layers in weights.items() if name not in foreign}
        if foreign and not weights:
            self.transformer.load_lora_adapter(state_dict, prefix="transformer")  # for diffusers' warning
            return
        if foreign:
            logger.warning(f"The adapter has weights for {quote(foreign)}, which no cascade has: they are ignored.")
        adapter_name = adapter_name or self._make_adapter_name()
        transformers = self._get_lora_transformers()

        # Check everything before changing anything.
        check_adapter_fits(weights, transformers)
        classes = read_classes(weights, metadata)
        embeddings = {
            name: layers.pop(CLASS_EMBEDDING) for name, layers in weights.items() if CLASS_EMBEDDING in layers
        }
        weights = {name: layers for name, layers in weights.items() if layers}
        configs = {name: read_config(name, metadata[name], weights[name]) for name in weights if name in metadata}
        self._check_adapter_name(adapter_name, list(weights), hotswap)
        replaced = self._former_classes.adapter_name if self._former_classes is not None else None
        if embeddings and replaced is not None and not (hotswap and replaced == adapter_name):
            raise ValueError(
                f"The adapter brings its own classes, but `{replaced}` already did. Call"
                f" `delete_adapters({replaced!r})` first."
            )

        with self._unchanged_on_error():
            if hotswap:
                self._restore_classes([adapter_name])
            if classes is not None:
                former_classes = self._get_classes(adapter_name)
                self._set_classes(embeddings, dict.fromkeys(embeddings), classes[1])
                self._former_classes = former_classes
            for name, layers in weights.items():
                transformers[name].load_lora_adapter(
                    layers,
                    prefix=None,
                    adapter_name=adapter_name,
                    metadata=configs.get(name),
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    _pipeline=self,
                )
                transformers[name].train(transformers[name].training)  # PEFT's dropout is always on at first
            if not hotswap:
                # PEFT activates it only in its own stages; the others would keep the previous adapter active.
                self.set_adapters(adapter_name)

    @class_or_instance_method
    def save_lora_weights(
        pipeline,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = LORA_WEIGHT_NAME_SAFE,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        transformer_2_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        transformer_2_lora_adapter_metadata: dict[str, Any] | None = None,
        transformer_3_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        transformer_3_lora_adapter_metadata: dict[str, Any] | None = None,
        transformer_4_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        transformer_4_lora_adapter_metadata: dict[str, Any] | None = None,
        adapter_name: str | None = None,
        save_class_embeddings: bool = False,
    ) -> None:
        r"""
        Saves an adapter from all of its stages into one file, for [`~load_lora_weights`]. Called on the class, as in
        diffusers' pipelines, it saves the layers that it is given; called on a pipeline without layers, those of one
        of the pipeline's adapters, with their configuration.

        Args:
            save_directory (`str` or `os.PathLike`): A folder, created if it does not exist.
            transformer_lora_layers, transformer_2_lora_layers, ... (`dict[str, torch.Tensor]`, *optional*):
                A stage's weights by layer, as PEFT's `get_peft_model_state_dict` returns them.
            is_main_process (`bool`, defaults to `True`): Whether this process writes the file; others do nothing.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`): The file's name.
            save_function (`Callable`, *optional*): Called as `save_function(weights, path)` instead of safetensors'.
            safe_serialization (`bool`, defaults to `True`): As in diffusers; `False` is refused.
            transformer_lora_adapter_metadata, transformer_2_lora_adapter_metadata, ... (`dict`, *optional*):
                A stage's `LoraConfig.to_dict()`. Without it, alpha equals the rank once the file is loaded.
            adapter_name (`str`, *optional*): The pipeline's adapter to save; required if there are several.
            save_class_embeddings (`bool`, defaults to `False`):
                Whether to also save all stages' class embeddings and the class names. Required if the adapter was
                trained for other classes than those of the pipeline it will be loaded into.

        Raises:
            ImportError: PEFT is not installed.
            OSError: The file cannot be written.
            ValueError: There are no layers or no such adapter, it is of a kind that cannot be loaded, the path is not
                a folder, or the file would not be a safetensors file.
        """
        _require_peft()
        weight_name = weight_name or LORA_WEIGHT_NAME_SAFE
        _check_name(weight_name)
        _check_is_safetensors("safe_serialization", safe_serialization)
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` is a file: {save_directory}. Pass a folder.")
        given = {
            "transformer": (transformer_lora_layers, transformer_lora_adapter_metadata),
            "transformer_2": (transformer_2_lora_layers, transformer_2_lora_adapter_metadata),
            "transformer_3": (transformer_3_lora_layers, transformer_3_lora_adapter_metadata),
            "transformer_4": (transformer_4_lora_layers, transformer_4_lora_adapter_metadata),
        }
        layers = {name: weights for name, (weights, _) in given.items() if weights}
        metadata = {name: config for name, (_, config) in given.items() if name in layers}
        for name, weights in layers.items():
            if not isinstance(weights, (dict, torch.nn.Module)):
                raise TypeError(
                    f"`{name}_lora_layers` has to hold weights by layer but is {weights!r}. To save an adapter of a"
                    " pipeline, pass its name as `adapter_name`."
                )
        if layers and (adapter_name is not None or save_class_embeddings):
            raise ValueError(
                "`adapter_name` and `save_class_embeddings` are for a pipeline's adapter: pass no layers."
            )
        if not layers:
            if isinstance(pipeline, type):
                raise ValueError(
                    "You must pass at least one of `transformer_lora_layers`, `transformer_2_lora_layers` and so on,"
                    " or save the adapter of a pipeline: `pipe.save_lora_weights(...)`."
                )
            layers, metadata = pipeline._collect_adapter(adapter_name, save_class_embeddings)
        faults = [config_fault(name, config) for name, config in metadata.items() if config and name != PIPELINE]
        if any(faults):
            raise ValueError(
                f"{next(filter(None, faults))} It could not be loaded again: save a plain LoRA or DoRA adapter."
            )
        if is_main_process:
            with write_whole(Path(save_directory, weight_name)) as unfinished:
                pipeline._save_lora_weights(
                    unfinished.parent,
                    lora_layers=layers,
                    lora_metadata=metadata,
                    weight_name=unfinished.name,
                    save_function=save_function,
                )

    def _collect_adapter(
        self, adapter_name: str | None, with_classes: bool
    ) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, Any]]]:
        """Returns the weights and configuration of one of the pipeline's adapters by stage."""
        from peft import get_peft_model_state_dict

        adapter_name = self._get_saved_adapter_name(adapter_name)
        layers, metadata = {}, {}
        for name, transformer in self._get_lora_transformers().items():
            if adapter_name in getattr(transformer, "peft_config", {}):
                layers[name] = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
                metadata[name] = plain_config(transformer, adapter_name)
            if with_classes:
                weight = get_class_embedding(transformer).detach()
                layers[name] = {**layers.get(name, {}), CLASS_EMBEDDING: weight}
        of_pipeline = {"id2label": self.config.id2label} if with_classes else {}
        rights = [config[RIGHTS_KEY] for name in layers if RIGHTS_KEY in (config := getattr(self, name).config)]
        if rights:  # as a saved stage says it
            of_pipeline[RIGHTS_KEY] = rights[0]
        if of_pipeline:
            metadata[PIPELINE] = of_pipeline
        return layers, metadata

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
        for transformer in self._get_lora_transformers().values():
            if not getattr(transformer, "peft_config", None):
                transformer.unload_lora()  # PEFT leaves its layers, with other weight names, around the model's own

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
                f"`hotswap=True` needs an adapter `{adapter_name}` on the new one's stages, {quote(stages)}, but it"
                f" is on {quote(present) or 'none'}. Load the new one under another name, without `hotswap`."
            )
        if present and not hotswap:
            raise ValueError(
                f"The pipeline already has an adapter `{adapter_name}`. Pass another `adapter_name`, or call"
                f" `delete_adapters({adapter_name!r})` first."
            )

    def _get_classes(self, adapter_name: str) -> FormerClasses:
        transformers = self._get_lora_transformers()
        embeddings = {
            name: torch.cat([getattr(transformer, table).weight for table in transformer.class_tables], dim=1)
            for name, transformer in transformers.items()
        }
        factors = {name: transformer.config.get("class_factors") for name, transformer in transformers.items()}
        return FormerClasses(adapter_name, embeddings, factors, self.config.id2label)

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
        if not self._is_fused(former.adapter_name):
            self._set_classes(former.embeddings, former.class_factors, former.id2label)
        self._former_classes = None

    def _is_fused(self, adapter_name: str) -> bool:
        modules = itertools.chain(*(transformer.modules() for transformer in self._get_lora_transformers().values()))
        return any(adapter_name in getattr(module, "merged_adapters", ()) for module in modules)

    @contextlib.contextmanager
    def _base_classes(self) -> Iterator[None]:
        """Inside this context, the pipeline has the classes that its weights without adapters were trained for."""
        former = self._former_classes
        if former is None or self._is_fused(former.adapter_name):
            yield
            return
        current = self._get_classes(former.adapter_name)
        self._set_classes(former.embeddings, former.class_factors, former.id2label)
        try:
            yield
        finally:
            self._set_classes(current.embeddings, current.class_factors, current.id2label)

    @contextlib.contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Undoes what the block did to the stages' modules, adapters and classes if it raises an error."""
        transformers = self._get_lora_transformers().values()
        modules = list(itertools.chain(*(transformer.modules() for transformer in transformers)))
        attributes = [
            {name: value.copy() if type(value) in (dict, list) else value for name, value in vars(module).items()}
            for module in modules
        ]
        flags = [(p, p.requires_grad) for transformer in transformers for p in transformer.parameters()]
        adapters = [
            (p, p.detach().clone())
            for transformer in transformers
            for name, p in transformer.named_parameters()
            if ".lora_" in name
        ]
        classes = (self._former_classes, self.config.id2label)
        try:
            yield
        except Exception as error:
            for module, former in zip(modules, attributes):
                vars(module).clear()
                vars(module).update(former)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)
            for parameter, data in adapters:
                parameter.data = data
            self._former_classes = classes[0]
            self.register_to_config(id2label=classes[1])
            if isinstance(error, (ImportError, MemoryError, torch.OutOfMemoryError)):
                raise
            raise ValueError(f"The adapter cannot be loaded, and the pipeline is as before: {error}") from error

    @contextlib.contextmanager
    def _scaled_adapters(self, scale: float) -> Iterator[None]:
        """Multiplies the strength of all adapters that are not fused by `scale` here, in this thread only."""
        if scale != 1:
            transformers = self._get_lora_transformers().values()
            for module in itertools.chain(*(transformer.modules() for transformer in transformers)):
                if hasattr(module, "lora_A") and not isinstance(module.scaling, _Scaling):
                    module.scaling = _Scaling(module.scaling)
        token = _SCALE_OF_CALL.set(scale)
        try:
            yield
        finally:
            _SCALE_OF_CALL.reset(token)


_SCALE_OF_CALL = ContextVar("scale of this call's adapters", default=1.0)


class _Scaling(dict):
    """An adapted layer's strengths by adapter, for layers that pipelines in several threads may share."""

    def __getitem__(self, adapter_name: str) -> float:
        return super().__getitem__(adapter_name) * _SCALE_OF_CALL.get()


def _require_peft() -> None:
    if not USE_PEFT_BACKEND:
        raise ImportError(
            "LoRA adapters need PEFT, which is missing or too old. Run `pip install -U peft transformers`."
        )


def _check_is_safetensors(option: str, value: bool) -> None:
    if not value:
        raise ValueError(f"`{option}={value}` asks for a pickle, which can run code. Adapters are always safetensors.")


def _check_name(name: str) -> None:
    if Path(name).suffix != ".safetensors":
        raise ValueError(
            f"`{name}` is not a safetensors file. LoRA weights are only read and written as safetensors, as pickles"
            " can run code: pass a name that ends in `.safetensors`."
        )
