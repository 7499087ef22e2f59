"""From what a configuration calls a model to a folder on this machine.

    the embedded model's name -> converted once into the cache
    a folder                  -> itself
    anything like a hub id    -> downloaded by huggingface_hub into its own cache

Torch-free unless something has to be converted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pdserve.config import Config, ModelConfig
from pdserve.engine.convert import REVISION, convert_gguf
from pdserve.engine.embedded import find_embedded
from pdserve.engine.progress import Progress, ProgressSink
from pdserve.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What serving reads; no other weights, no code.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    path: Path  # a folder with config, tokenizer and safetensors
    served_name: str


def default_cache() -> Path:
    return Path.home() / ".cache" / "pdserve" / "models"


def cache_folder(config: Config) -> Path:
    """Where converted models are kept."""
    given = config.model_cache
    return Path(given).expanduser().resolve() if given else default_cache()


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder here would be asked for on the model hub."""
    return not _looks_local(path) and HUB_ID.fullmatch(path) is not None


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def prepare_model(model: ModelConfig, cache_dir: Path, progress: ProgressSink) -> PreparedModel:
    """Makes the model available as a folder. ConfigError: one line that says what is wrong."""
    name = model.served_name or model.path.rstrip("/").rsplit("/", 1)[-1]
    embedded = find_embedded(model.path)
    if embedded is not None:
        target = cache_dir / f"{embedded.name}-{embedded.version}-r{REVISION}"
        return PreparedModel(convert_gguf(embedded.gguf, target, progress), name)
    folder = Path(model.path).expanduser()
    if model.path and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder} is no model folder: it has no config.json", param="model.path"
            )
        return PreparedModel(folder.resolve(), name)
    if _looks_local(model.path) or folder.is_file():
        raise ConfigError(f"there is no model folder {model.path}", param="model.path")
    if not is_hub_id(model.path):
        raise ConfigError(
            f"{model.path!r} is neither a folder nor a hub id (owner/name)", param="model.path"
        )
    return PreparedModel(_download(model, progress), name)


def _download(model: ModelConfig, progress: ProgressSink) -> Path:
    # Imported here: a model that is at hand needs no hub client.
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    progress(Progress(f"fetching {model.path} from the model hub", 1, 1))
    where = f"{model.path} at revision {model.revision}" if model.revision else model.path
    try:
        return Path(
            snapshot_download(
                model.path, revision=model.revision or None, allow_patterns=list(HUB_FILES)
            )
        )
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"the model hub has no revision {model.revision} of {model.path}",
            param="model.revision",
        ) from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"the model hub asks for permission to read {model.path}; log in and accept its terms",
            param="model.path",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{model.path} is no folder here, and the model hub has no such model (or it is "
            "private)",
            param="model.path",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{where} is no folder here, and the model hub cannot be reached", param="model.path"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where} could not be fetched: {first}", param="model.path") from error
