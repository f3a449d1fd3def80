"""Load a model and its tokenizer from a local folder, the hub, or the package itself.

One place for everything that can go wrong there, so that a user reads what to do instead of a traceback from
inside transformers; and one rule that is never bent: code from a model's repository runs only if the caller
asked for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metier.errors import ConfigError, ModelError, UnsupportedModelError
from metier.models.encoder_decoder import ENCODER_DECODERS
from metier.models.foreign import follow_contract
from metier.models.weight_by_weight import WeightPlace, from_pretrained_by_weight

EMBEDDED = "embedded"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer; unpacks as `model, tokenizer = load(...)`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """What was asked for: the folder, the hub id, or "embedded"."""

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    place: WeightPlace | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer; a multimodal one, to be used on text; or a Switch Transformer.

    Args:
        model: a local folder, a hub id such as "allenai/OLMoE-1B-7B-0924", or "embedded" for the small model
            that ships with metier.
        dtype: "auto" keeps the checkpoint's own; else "float32", "bfloat16", "float16" or a `torch.dtype`.
        device: "cpu", "cuda", "cuda:1" …; None takes the first CUDA device where there is one, else the CPU.
        revision: branch, tag or commit on the hub; not for local folders.
        trust_remote_code: run Python code that lies beside the weights. Never done unless True.
        place: where the large weights go, one at a time; `metier.load_frozen` has such places.

    A tokenizer without a padding token gets one that is in its vocabulary already: a padding token by its
    usual names, else the end-of-text token. The embedding matrix never grows.

    Raises:
        ConfigError: an unknown dtype or device, or a revision of a local folder.
        UnsupportedModelError: the model is another encoder-decoder, a Llama 4 with several experts a token, or one
            whose weights cannot be put in a place.
        ModelError: anything else that keeps the model or its tokenizer from being loaded whole.
    """
    source = str(model)
    resolved_dtype, resolved_device = _dtype(dtype), _device(device)
    target = resolve_source(model, revision=revision)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        common["revision"] = revision
    model_config = read_config(target, common)
    network_class = network_class_for(source, model_config)
    options = {"dtype": resolved_dtype, **common, **_dequantised(model_config)}
    try:
        if place is None:
            network, info = network_class.from_pretrained(target, output_loading_info=True, **options)
        else:
            network, info = from_pretrained_by_weight(network_class, target, model_config, place, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{source}: the model could not be loaded: {first_line(error)}\n"
            f"Expected a causal language model that the installed transformers knows, with its weights."
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(
            f"{source}: the checkpoint lacks {len(names)} of the model's tensors, such as {names[0]!r}; "
            f"they would be random.\nDownload the checkpoint again, or load a revision that is whole."
        )
    if "quantization_config" in options:
        # transformers would quantise again what is saved, in a folder whose configuration says nothing of that
        vars(network).pop("_weight_conversions", None)
        if isinstance(resolved_dtype, torch.dtype):
            _to_dtype(network, resolved_dtype)
    follow_contract(network)
    tokenizer = _load_tokenizer(source, target, common)
    _ensure_pad_token(source, tokenizer)
    network.config.pad_token_id = tokenizer.pad_token_id
    return LoadedModel(model=network.to(resolved_device).eval(), tokenizer=tokenizer, source=source)


def _dequantised(config: PreTrainedConfig) -> dict[str, Any]:
    """Checkpoints in MXFP4 (GPT-OSS) and FP8 (DeepSeek-V3) are loaded as the floating-point weights they stand for.

    Left alone, transformers would do so or not by the kernels it finds, and kept in few bits experts cannot be trained.
    """
    made = getattr(config, "quantization_config", None)
    method = made.get("quant_method") if isinstance(made, dict) else getattr(made, "quant_method", None)
    quantised = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}.get(str(getattr(method, "value", method)))
    return {} if quantised is None else {"quantization_config": quantised(dequantize=True)}


def _to_dtype(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """What a quantised checkpoint holds as plain numbers, too, which transformers leaves in the checkpoint's dtype."""
    for parameter in network.parameters():
        # float32 is what a family wants for the few that it keeps so
        if parameter.is_floating_point() and parameter.dtype not in (dtype, torch.float32):
            parameter.data = parameter.data.to(dtype)


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConfigError(f"dtype: got {dtype!r}, expected 'auto', 'float32', 'bfloat16' or 'float16'.")
    return named


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: got {device!r}, expected a device of torch such as 'cpu' or 'cuda:0'.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: got {device!r}, but torch {torch.__version__} sees no CUDA device; use 'cpu'.")
    return resolved


def resolve_source(model: str | Path, *, revision: str | None = None) -> str:
    """The folder's path or the hub id, after every check that needs no network."""
    if model == EMBEDDED:
        from metier.embedded import model_path  # the package's data is only touched when asked for

        folder = Path(model_path())
    else:
        folder = Path(model).expanduser()
        if isinstance(model, str) and not folder.exists() and _HUB_ID.fullmatch(model):
            return model
    _check_folder(folder)
    if revision is not None:
        raise ConfigError(f"revision: got {revision!r} for the local folder {folder}; revisions exist on the hub only.")
    return str(folder)


def _check_folder(folder: Path) -> None:
    next_step = "Give a folder written by `save_pretrained`, a hub id such as 'org/name', or 'embedded'."
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise ModelError(f"{folder}: got {got}, expected a model folder.\n{next_step}")
    if not (folder / "config.json").is_file():
        got = "no config.json"
        if (folder / "adapter_config.json").is_file():
            got = "a PEFT adapter"
            next_step = "Load the adapter's base, then `peft.PeftModel.from_pretrained(model, folder)`."
        raise ModelError(f"{folder}: got {got}, expected a model folder.\n{next_step}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: got no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}.\n"
            f"Save the model's tokenizer into the same folder with `tokenizer.save_pretrained`."
        )


def network_class_for(source: str, config: PreTrainedConfig) -> Any:
    """A multimodal model has no text-only class in many families; it takes text alone just as well."""
    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if config.model_type in ENCODER_DECODERS:
        return AutoModelForSeq2SeqLM
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{source}: got an encoder-decoder ({MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[kind].__name__}), expected a "
            f"causal language model.\nOf encoder-decoders metier can train only {', '.join(sorted(ENCODER_DECODERS))}; "
            f"docs/support.md lists what it works on."
        )
    return AutoModelForMultimodalLM if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


def read_config(target: str, common: dict[str, Any]) -> PreTrainedConfig:
    """The configuration; a ModelError where it cannot be read without running the repository's own code."""
    try:
        return AutoConfig.from_pretrained(target, **common)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{target}: the model needs Python code from its own repository, which metier does not run "
                f"unless asked.\nRead that code; if you trust it, load with trust_remote_code=True."
            ) from error
        raise ModelError(
            f"{target}: the configuration could not be read: {first_line(error)}\n"
            f"Expected a model folder, a hub id that can be reached (and, if gated, a login), or 'embedded'."
        ) from error


def _load_tokenizer(source: str, target: str, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(target, **common)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        next_step = "Save a tokenizer that the installed transformers can read into the model's folder."
        if "trust_remote_code" in str(error):
            next_step = "It needs code from its repository; if you trust it, load with trust_remote_code=True."
        raise ModelError(f"{source}: the tokenizer could not be loaded: {first_line(error)}\n{next_step}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), f"got {type(tokenizer).__name__} as tokenizer"
    return tokenizer


def _ensure_pad_token(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    tokenizer.pad_token = next((token for token in _PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{source}: the tokenizer has neither a padding nor an end-of-text token; expected one of them.\n"
            f"Set tokenizer.eos_token and save the tokenizer again."
        )


def ignore_renamed_options() -> None:
    """transformers renames options that PEFT and TRL still use; a user can do nothing about it."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
