"""Removes the wrappers that other packages put around a model, or raises an error with a remedy."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_OWN_FORWARD = {"XLORA", "POLY"}  # PEFT methods that do part of their work in the forward of the PeftModel


def is_pretrained_model(module: nn.Module) -> bool:
    """True for models of transformers, which is not imported here: without an earlier import, no such model exists."""
    loaded: Any = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def compiled_original(module: nn.Module) -> nn.Module:
    """The original of a module that `torch.compile` returned; other modules are returned unchanged."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


def unwrap(model: nn.Module, runs_whole: bool = False) -> nn.Module:
    """The model without (nested) wrappers of torch.compile, PEFT, sentence-transformers and AveragedModel.

    Args:
        runs_whole: the caller runs the wrapper's own forward, so that DistributedDataParallel and fully_shard are
            accepted, too.

    Raises:
        ValueError: a part of the model cannot run without the wrapper, or the parameters are sharded or offloaded. The
            message says what to do instead.
    """
    while (inner := _inside(model, runs_whole)) is not model:
        model = inner
    if torch.distributed.is_available():
        _refuse_sharded(model, runs_whole)
    hooked = any("_hf_hook" in vars(module) for module in model.modules())
    if hooked and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "model: accelerate offloads its weights to CPU or disk. Load it without offloading, "
            'for example with device_map={"": 0}'
        )
    return model


def _refuse_sharded(model: nn.Module, runs_whole: bool) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    flattened = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if flattened and runs_whole:
        raise ValueError("model: FullyShardedDataParallel has flattened its parameters. Use fully_shard (FSDP2)")
    if flattened:
        raise ValueError(
            "model: FullyShardedDataParallel has flattened shards instead of its parameters. Create the extractor from "
            "the unwrapped model and shard the extractor"
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        if runs_whole:
            return
        raise ValueError(
            "model: fully_shard has been applied to it. Create the extractor first, then shard its parts: "
            "fully_shard(layer) for each layer but the last in the list of extractor.base, then fully_shard(extractor)"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "model: its parameters are sharded (DTensor). Load it without a tensor-parallel plan and create "
            "the extractor before the model is sharded"
        )


def _inside(model: nn.Module, runs_whole: bool) -> nn.Module:
    """The model without its outermost wrapper, or the model itself."""
    name = type(model).__name__
    if isinstance(model, DistributedDataParallel):
        if runs_whole:
            return model.module
        raise ValueError(
            "model: DistributedDataParallel synchronizes gradients only in its own forward. Create the extractor from "
            "model.module and wrap the extractor: DistributedDataParallel(QKVExtractor(model.module))"
        )
    if isinstance(model, DataParallel) and runs_whole:
        raise ValueError(
            "model: DataParallel runs copies of the model in threads, which a recorder does not support. Wrap the "
            "model in DistributedDataParallel"
        )
    if isinstance(model, DataParallel):
        raise ValueError(
            "model: DataParallel runs copies of the model in threads, which an extractor does not support. Create "
            "the extractor from model.module and wrap the extractor in DistributedDataParallel"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model: the code of a {name} is compiled and cannot be divided. Give the original model")
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model._orig_mod
    if isinstance(model, AveragedModel):
        return model.module
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return _inside_peft(model)
    if "sentence_transformers" in sys.modules and type(model).__module__.partition(".")[0] == "sentence_transformers":
        return _inside_sentence_transformers(model)
    if not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        user = "recorder" if runs_whole else "extractor"
        raise ValueError(f"model: {name} is a wrapper. Create the {user} from model.module")
    return model


def _inside_peft(model: Any) -> nn.Module:
    for name, config in model.peft_config.items():
        method = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or method in _OWN_FORWARD or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"model: adapter {name!r} ({method}) acts in the forward of {type(model).__name__}, which an "
                "extractor does not run. Merge the adapter (merge_and_unload), or use one that changes modules only, "
                "such as LoRA"
            )
    return model.base_model.model


def _inside_sentence_transformers(model: Any) -> nn.Module:
    """The first module of a SentenceTransformer, or the model in such a module (`auto_model` in older versions)."""
    if isinstance(model, nn.Sequential) and len(model):
        return model[0]
    for name in ("model", "auto_model"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return inner
    raise ValueError(
        f"model: {type(model).__name__} of sentence-transformers has no single transformers model. Give the model of "
        "the module that has one, such as st[0].model"
    )
