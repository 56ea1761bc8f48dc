"""The hub: its client, huggingface_hub, is optional, and knows cache, mirrors and tokens."""
from pathlib import Path
from textwrap import shorten

from support.files import DataError, brief

LLM_FILES = ["*.json", "*.model", "*.tiktoken", "merges.txt", "*.safetensors"]
OTHER_FORMATS = ["*/*", "consolidated*"]    # the same weights again: in a model's folders, and Mistral's own
HUB_ADVICE = {      # for each kind of error of its client
    "ModuleNotFoundError": "pip install huggingface_hub",
    "RepositoryNotFoundError": "check the name; if it is private, run: hf auth login",
    "GatedRepoError": "accept the licence on its page at the hub, make a token there, run: hf auth login",
}


def find_llm(name, fetch: bool = False) -> Path:
    """The checkpoint's folder, given that or a hub name. Raises DataError that says how to get it."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise DataError(f"{name}: a file; name the folder of a checkpoint, with config.json, tokenizer and "
                        "whole weights in .safetensors (GGUF is not read)")
    folder = hub_folder(str(name), "model", LLM_FILES, fetch)
    if folder is None:
        raise DataError(f"{name}: no such backbone, neither as a folder nor in the hub's cache; name its "
                        f"folder with --llm, or get it: hf download {name} (or train.py --download)")
    if fetch and not any(folder.glob("*.safetensors")):
        hub_folder(str(name), "model", ["*.bin"], fetch)        # an old one has its weights in this format
    return folder


def hub_folder(repo: str, kind: str, files: list, fetch: bool) -> Path | None:
    """Where the hub's client keeps files of a "model" or "dataset". fetch: get them first, or DataError."""
    ignored = OTHER_FORMATS if kind == "model" else None
    try:
        from huggingface_hub import snapshot_download   # optional
        folder = snapshot_download(repo, repo_type=kind, allow_patterns=files, ignore_patterns=ignored,
                                   local_files_only=not fetch)
        return Path(folder)
    except Exception as error:      # whatever its client raises
        if not fetch:
            return None
        reason = shorten(brief(error), 200, placeholder=" ...")
        advice = HUB_ADVICE.get(type(error).__name__, "check the network and the name")
        raise DataError(f"{repo} cannot be fetched ({reason}): {advice}; or by hand: "
                        f"hf download {repo} --repo-type {kind}") from None
